"""One corpus of each kind, poisoned in every way we know, through the real pipeline.

What is bad is counted by its reason with an example, what is good comes out to the bit, and nothing else happens.
"""

import collections
import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import manifest, records
from data_pipelines.cache import Cache
from data_pipelines.filters import Filters
from data_pipelines.kinds import KINDS
from data_pipelines.packed_rows import Candidate, encode, encoded_size
from data_pipelines.pipeline import Stage, batches
from data_pipelines.preparation import Preparation
from data_pipelines.row_groups import RowGroups
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import DocumentSource
from data_pipelines.training_form import COLUMNS
from data_pipelines.units import Recipe, prepare_unit
from idefics_jax.batch import BatchShape
from idefics_jax.documents import EndOfUtterance, Image
from idefics_jax.errors import UserError
from tests.data_pipelines import poison
from tests.data_pipelines.pictures import png
from tests.data_pipelines.tars import write_tar

ROOT = Path(__file__).parents[2]
SHAPE = BatchShape(rows=2, tokens=256, vision_rows=2, patches=128, images=8)
GOOD = 12
LOOKAHEAD = 4
# What goes by another reason in some kinds. A page is cut before its word of 1 MB, and its image alone teaches nothing.
TOLD_OTHERWISE = {
    ("pdf", "no text"): ("nothing-trained",),
    ("obelics", "null"): ("not-one-of-two",),
    ("obelics", "no text"): ("nothing-trained",),
    ("obelics", "a word of 1 MB"): ("too-many-tokens", "nothing-trained"),
}


def row_of(kind: str, image: bytes | None, text: str | None, folder: Path, *, published: bool) -> dict:
    """Returns a row with one image and one text, in the published or in the training form."""
    if kind == "cauldron":
        turn = {"user": "what?", "assistant": text, "source": "s"}
        return {"images": [] if image is None else [{"bytes": image, "path": "a.png"}], "texts": [turn]}
    if kind == "text":
        return {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": text}]}
    if kind == "pdf":
        return {"images": [{"bytes": image, "path": None}], "texts": [text]}
    if kind == "pairs":
        return {"png" if published else "image": image, "caption": text}
    if not published:
        return {"images": [image, None], "texts": [None, text]}
    name = f"{len(list(folder.iterdir()))}.png"
    (folder / name).write_bytes(image)
    return {"images": [name, None], "texts": [None, text]}


def corpus(kind: str, folder: Path, *, published: bool) -> tuple[list[dict], dict[int, tuple[str, ...]]]:
    """Returns rows, bad ones after the good, and the reasons of each bad one by its place."""
    make = functools.partial(row_of, kind, folder=folder, published=published)
    found = [(make(png(28 + i, 28), f"good {i}"), ()) for i in range(GOOD)]
    for name, (text, reason) in poison.texts().items():
        reason = "damaged-record" if reason == "not-utf8" and not published else reason
        found.append((make(png(30, 30), text), TOLD_OTHERWISE.get((kind, name), (reason,) if reason else ())))
    for image, reason in poison.images().values() if kind != "text" else ():
        found.append((make(image, "words"), (reason,) if reason else ()))
    found += [(row, (reason,) if reason else ()) for row, reason in others(kind, published)]
    return [row for row, _ in found], {i: reasons for i, (_, reasons) in enumerate(found) if reasons}


def others(kind: str, published: bool) -> list[tuple[dict, str | None]]:
    """Rows of one kind with nulls and names where they should not be."""
    turns = [{"user": "what?", "assistant": "words", "source": None}]
    stored = {"bytes": png(28, 28), "path": "../../outside.png"}
    if kind == "cauldron":
        return [
            ({"images": None, "texts": turns}, None),
            ({"images": [stored], "texts": turns}, None),
            ({"images": [stored] * 10_000, "texts": turns}, "too-many-images"),
            ({"images": [None], "texts": turns}, "null-image"),
            ({"images": [], "texts": None}, "no-turns"),
            ({"images": [], "texts": [None]}, "null-text"),
            ({"images": None, "texts": None}, "no-turns"),
        ]
    if kind == "pairs":
        image = "png" if published else "image"
        return [({image: None, "caption": "words"}, "null-image"), ({image: None, "caption": None}, "null-text")]
    if kind == "pdf":
        return [
            ({"images": None, "texts": None}, "lengths-differ"),
            ({"images": [stored], "texts": ["a", "b"]}, "lengths-differ"),
            ({"images": [stored, None], "texts": ["a", "b"]}, "null-image"),
            ({"images": [stored, stored], "texts": ["a", ""]}, None),
        ]
    if kind == "text":
        return [
            ({"messages": None}, "roles"),
            ({"messages": [None]}, "roles"),
            ({"messages": [{"role": None, "content": None}]}, "roles"),
            ({"messages": [{"role": "assistant", "content": "words"}]}, "roles"),
        ]
    names = [
        ("gone.png", "missing-image"),
        ("../outside.png", "outside-image-root"),
        ("/etc/hosts", "outside-image-root"),
    ]
    names += [("a\x00b.png", "missing-image"), ("x" * 300, "missing-image"), ("http://a.b/c.png", "missing-image")]
    return [
        ({"images": [None, None], "texts": ["no", "image"]}, None),
        ({"images": None, "texts": None}, "empty"),
        ({"images": [None], "texts": ["a", "b"]}, "lengths-differ"),
        ({"images": [None], "texts": [None]}, "not-one-of-two"),
        *(({"images": [name, None], "texts": [None, "words"]}, reason) for name, reason in names if published),
    ]


def spoil(path: Path) -> None:
    """Puts bytes that are no text in the place of the mark."""
    data, said = path.read_bytes(), poison.NOT_UTF8.ljust(len(poison.MARK))
    path.write_bytes(data.replace(poison.MARK.encode(), said))


def write_parquet(kind: str, rows: list[dict], folder: Path, **options) -> str:
    schema = KINDS[kind].SCHEMA
    names = [name for name in schema.names if name in {name for row in rows for name in row}]
    table = pa.Table.from_pylist(rows, schema=pa.schema([schema.field(name) for name in names]))
    path = folder / "rows.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False, **options)
    spoil(path)
    return str(path)


def write_shards(kind: str, rows: list[dict], folder: Path) -> str:
    """Writes rows as shards, unchecked."""
    folder.mkdir()
    encoded = (records.encode(f"rows:{i}", row) for i, row in enumerate(rows))
    said = poison.NOT_UTF8.ljust(len(poison.MARK))
    spoilt = (record.replace(poison.MARK.encode(), said) for record in encoded)
    shards = records.write_shards(spoilt, folder, prefix="00000", shard_bytes=2**30)
    told = {
        "format": manifest.FORMAT,
        "kind": kind,
        "columns": COLUMNS[kind],
        "shards": [shard.told() for shard in shards],
        "digest": manifest.digest_of(shards),
    }
    manifest.write_json(folder / manifest.MANIFEST, told)
    return str(folder)


def with_source(config, source: SourceConfig, **changes):
    changes = {
        "shape": SHAPE,
        "document_tokens": SHAPE.tokens,
        "virtual_shards": 1,
        "max_bad_fraction": 0.99,
        "lookahead": LOOKAHEAD,
        "rounds": 0,
        "cache_mib": 16,
        **changes,
    }
    return dataclasses.replace(config, stages=(Stage((source,)),), **changes)


def start(config, processor):
    return batches(config, processor, process_index=0, process_count=1)


def read_an_epoch(config, processor, rows: int) -> list:
    """Returns batches until every row has been read twice."""
    iterator, packed = start(config, processor), []
    while not packed or packed[-1].seen < 2 * rows + 16:
        packed.append(next(iterator))
    return packed


def place(name: str) -> int:
    """Returns the row that a document is called by: "mine/rows.parquet:7[0:2]" is of row 7."""
    return int(name.rpartition(":")[2]) if "[" not in name else int(name.rpartition("[")[0].rpartition(":")[2])


def assert_unchanged(packed, documents: dict[int, tuple], processor) -> None:
    """Asserts that a batch holds, to the bit, what its documents are when encoded alone."""
    batch, names = packed.arrays, iter(packed.documents)
    for row, segments in enumerate(batch["segment_ids"]):
        image = 0
        for segment in range(1, segments.max() + 1):
            alone = processor.encode(documents[place(next(names))], add_bos=True, add_eos=True)
            here = segments == segment
            np.testing.assert_array_equal(batch["tokens"][row][here], alone.tokens)
            np.testing.assert_array_equal(batch["loss_weights"][row][here][:-1], alone.trained[1:])
            for patches in processor.patches(alone):
                image += 1
                where = np.argwhere(batch["patch_image_ids"][row] == image)
                np.testing.assert_array_equal(batch["patches"][row][tuple(where.T)], patches)
        assert batch["image_mask"][row].sum() == image
    assert next(names, None) is None


def assert_no_control_token_is_forged(packed, documents: dict[int, tuple], processor) -> None:
    tokenizer, found = processor.tokenizer, collections.Counter(packed.arrays["tokens"].ravel().tolist())
    parts = [part for name in packed.documents for part in documents[place(name)]]
    images = sum(isinstance(part, Image) for part in parts)
    assert found[tokenizer.image_token_id] == images * processor.num_latents
    assert found[tokenizer.end_of_utterance_id] == sum(isinstance(part, EndOfUtterance) for part in parts)
    assert found[tokenizer.bos_id] == found[tokenizer.eos_id] == len(packed.documents)


@pytest.mark.parametrize("published", [True, False], ids=["parquet", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_bad_is_counted_and_what_is_good_is_unchanged(kind, published, config, processor, tmp_path):
    (tmp_path / "images").mkdir()
    rows, bad = corpus(kind, tmp_path / "images", published=published)
    path = write_parquet(kind, rows, tmp_path) if published else write_shards(kind, rows, tmp_path / "shards")
    source = SourceConfig("mine", kind, (path,), image_root=str(tmp_path / "images"))
    packed = read_an_epoch(with_source(config, source), processor, len(rows))

    good = {i: KINDS[kind].parts(row, source.image_root) for i, row in enumerate(rows) if i not in bad}
    assert {place(name) for batch in packed for name in batch.documents} == set(good)
    last = packed[-1]
    assert set(last.rejected) == set(last.examples) == {reason for reasons in bad.values() for reason in reasons}
    assert all(reason in bad[place(name)] for reason, name in last.examples.items())
    waiting = last.seen - sum(len(batch.documents) for batch in packed) - sum(last.rejected.values())
    assert 0 <= waiting <= LOOKAHEAD
    for batch in packed:
        assert_unchanged(batch, good, processor)
        assert_no_control_token_is_forged(batch, good, processor)


def prepared(kind: str, path: str, folder: Path, image_root: Path) -> dict:
    """Prepares a file into a folder, in this process; returns the manifest."""
    recipe = Recipe(kind, str(image_root), Filters(), captions=(), features={}, max_pixels=64_000_000, shard_mib=64)
    preparation = Preparation(recipe, (path,), folder)
    with preparation.begun():
        reports = [prepare_unit(unit) for unit in preparation.units]
        return preparation.finish(reports, max_bad_fraction=0.99, keep_cut_short=False)


def documents_in(packed: list) -> set[bytes]:
    """Returns the ids of each document in some batches."""
    found = set()
    for batch in (step.arrays for step in packed):
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            found |= {tokens[segments == segment].tobytes() for segment in range(1, segments.max() + 1)}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_corpus_is_prepared_and_trains_as_it_would_have(kind, config, processor, tmp_path):
    (tmp_path / "images").mkdir()
    rows, bad = corpus(kind, tmp_path / "images", published=True)
    path = write_parquet(kind, rows, tmp_path)
    told = prepared(kind, path, tmp_path / "shards", tmp_path / "images")
    dropped = {reason: place(what["example"]) for reason, what in told["dropped"].items()}
    assert dropped
    assert all(reason in bad[example] for reason, example in dropped.items())
    direct = SourceConfig("mine", kind, (path,), image_root=str(tmp_path / "images"))
    shards = SourceConfig("mine", kind, (str(tmp_path / "shards"),))
    expected = read_an_epoch(with_source(config, direct), processor, len(rows))
    found = read_an_epoch(with_source(config, shards), processor, told["documents"])
    assert documents_in(found) == documents_in(expected)
    # What a header does not tell is found in training: damaged pixels, and a size that depends on the row.
    left = {reason for reasons in bad.values() for reason in reasons} - set(found[-1].rejected)
    assert left <= set(dropped)


def test_a_poisoned_tar_is_prepared_and_trains(config, processor, tmp_path):
    samples = {f"good{i}": (png(28 + i, 28), f"good {i}".encode()) for i in range(5)}
    samples |= {"../../outside": (png(28, 28), b"words"), "/etc/outside": (png(28, 28), b"words")}
    odd = {name: (data, b"words") for name, (data, reason) in poison.images().items() if reason is None}
    samples |= {name.replace(".", ""): sample for name, sample in odd.items()}
    bad = {name: (data, b"words") for name, (data, reason) in poison.images().items() if reason is not None}
    bad |= {"not utf-8": (png(28, 28), poison.NOT_UTF8), "no text": (png(28, 28), b"")}
    members = [
        (f"{name}.{suffix}", content)
        for name, sample in {**samples, **bad}.items()
        for suffix, content in zip(("png", "txt"), sample, strict=True)
    ]
    told = prepared("pairs", write_tar(tmp_path / "a.tar", members), tmp_path / "shards", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "shards"}
    assert {what["example"].split(":")[1] for what in told["dropped"].values()} <= set(bad)
    source = SourceConfig("mine", "pairs", (str(tmp_path / "shards"),))
    packed = read_an_epoch(with_source(config, source), processor, told["documents"])
    assert len({name for batch in packed for name in batch.documents}) == len(samples)


def test_poisoned_json_lines_are_prepared_and_train(config, processor, tmp_path):
    def line(answer: str) -> bytes:
        turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": turns}).encode()

    good = [*(f"good {i}" for i in range(5)), *(text for text, reason in poison.texts().values() if reason is None)]
    bad = [
        b"{",
        b"[]",
        b"null",
        b'{"messages": [1]}',
        b"[" * 10_000,
        line("\ud800"),
        poison.NOT_UTF8,
        line("x" * 2**20),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*map(line, good), *bad]))
    told = prepared("text", str(tmp_path / "a.jsonl"), tmp_path / "shards", tmp_path)
    assert {"bad-json", "wrong-type", "not-utf8"} <= set(told["dropped"])
    source = SourceConfig("mine", "text", (str(tmp_path / "shards"),))
    packed = read_an_epoch(with_source(config, source), processor, told["documents"])
    assert len({name for batch in packed for name in batch.documents}) == len(good)
    assert set(packed[-1].rejected) == {"too-many-tokens"}


def shown(packed: list) -> str:
    """Returns every document's name and the reasons, for two runs to be compared."""
    return repr([(batch.documents, batch.rejected, batch.examples) for batch in packed])


def test_poison_is_told_alike_whatever_the_threads_and_after_resuming(config, processor, tmp_path):
    rows, _ = corpus("pairs", tmp_path, published=True)
    source = SourceConfig("mine", "pairs", (write_parquet("pairs", rows, tmp_path),))
    expected = read_an_epoch(with_source(config, source), processor, len(rows))
    threaded = read_an_epoch(with_source(config, source, num_threads=3, prefetch=2), processor, len(rows))
    assert shown(threaded) == shown(expected)
    iterator = start(with_source(config, source), processor)
    for _ in range(3):
        next(iterator)
    resumed = start(with_source(config, source), processor)
    resumed.set_state(iterator.get_state())
    assert shown([next(resumed) for _ in expected[3:]]) == shown(expected[3:])


@pytest.mark.parametrize("published", [True, False], ids=["parquet", "shards"])
def test_too_much_poison_stops_the_run_with_a_sentence(published, config, processor, tmp_path):
    rows = [row_of("pairs", png(28, 28), "fine", tmp_path, published=published)] * 3
    rows.append(row_of("pairs", poison.bomb(16_384, 8_192), "x", tmp_path, published=published))
    path = write_parquet("pairs", rows, tmp_path) if published else write_shards("pairs", rows, tmp_path / "shards")
    config = with_source(config, SourceConfig("mine", "pairs", (path,)), max_bad_fraction=0.01)
    with pytest.raises(UserError) as stopped:
        read_an_epoch(config, processor, 1000)
    message = str(stopped.value)
    assert message.startswith("11 of ")
    assert "(bomb 11)" in message
    assert "claims 16384 x 8192 pixels" in message
    assert "\n" not in message


def elements(source: SourceConfig, processor) -> list[tuple]:
    """Returns what each row of a source becomes, in an order of its own."""
    prepare = functools.partial(encode, processor=processor, shape=SHAPE)
    opened = DocumentSource(
        source,
        prepare=prepare,
        prepared_size=encoded_size,
        cache=Cache(0),
        row_groups=RowGroups(0),
        seed=0,
        shards=1,
        shards_here=1,
    )
    return [opened.read(0, i) for i in range(int(opened.group_rows.sum()))]


def test_a_page_of_ten_thousand_images_is_cut_and_none_is_lost(processor, tmp_path):
    images, texts = [png(28, 28), None] * 10_000, [None, "word"] * 10_000
    path = write_shards("obelics", [{"images": images, "texts": texts}], tmp_path / "shards")
    (pieces,) = elements(SourceConfig("mine", "obelics", (path,)), processor)
    assert all(isinstance(piece, Candidate) for piece in pieces)
    assert sum(len(piece.sizes.images) for piece in pieces) == 10_000


def test_pages_without_end_are_cut_or_refused(processor, tmp_path):
    stored = {"bytes": png(28, 28), "path": None}
    rows = [
        {"images": [stored] * 3_000, "texts": ["a line"] * 3_000},
        {"images": [stored], "texts": ["\n" * 2**17]},
        {"images": [stored], "texts": ["word " * 2**12]},
        {"images": [stored], "texts": [" " * 2**17]},
    ]
    path = write_shards("pdf", rows, tmp_path / "shards")
    found = {place(pieces[0].name): pieces for pieces in elements(SourceConfig("mine", "pdf", (path,)), processor)}
    assert sum(len(piece.sizes.images) for piece in found[0]) == 3_000
    assert all(isinstance(piece, Candidate) for piece in found[2])
    for pieces in found.values():
        assert all(isinstance(piece, Candidate) or piece.reason in ("nothing-trained",) for piece in pieces)


def test_bombs_are_not_decoded_on_the_way(processor, tmp_path):
    processor.save(tmp_path / "processor")
    rows = [row_of("pairs", png(28, 28), "good", tmp_path, published=True)]
    write_parquet("pairs", rows, tmp_path)
    (tmp_path / "rows.parquet").rename(tmp_path / "good.parquet")
    bombs = [poison.bomb(16_384, 8_192), poison.bomb(100_000, 1_000), poison.gif_outgrown(), poison.bomb(8_001, 8_000)]
    rows += [row_of("pairs", data, "bomb", tmp_path, published=True) for data in bombs]
    write_parquet("pairs", rows, tmp_path)
    script = f"""
import resource, sys
from pathlib import Path
from data_pipelines.pipeline import DataConfig, Stage, batches
from data_pipelines.row_groups import RowGroups
from data_pipelines.source_config import SourceConfig
from idefics_jax.batch import BatchShape
from idefics_jax.processor import Processor
folder = Path({str(tmp_path)!r})
processor = Processor.load(folder / "processor")
def read(name, count):
    source = SourceConfig("mine", "pairs", (str(folder / name),))
    config = DataConfig(
        stages=(Stage((source,)),), seed=0, shape=BatchShape(rows=1, tokens=64, vision_rows=1, patches=64, images=8),
        document_tokens=64, virtual_shards=1, lookahead=2, lookahead_mib=64, rounds=0,
        max_bad_fraction=0.9, num_threads=2, prefetch=1, row_groups_mib=16,
        cache_mib=0,
    )
    iterator = batches(config, processor, process_index=0, process_count=1)
    for _ in range(count):
        packed = next(iterator)
    return packed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, before = read("good.parquet", 20)
packed, after = read("rows.parquet", 20)
print(sum(packed.rejected.values()), *packed.rejected, after - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    count, reason, grown = done.stdout.split()
    assert (int(count) > 20, reason) == (True, "bomb")
    assert int(grown) < 20_000  # kB; the smallest of them decodes to 64 MB
