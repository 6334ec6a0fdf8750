import dataclasses
import datetime
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import (
    cauldron,
    chat_layouts,
    filters,
    manifest,
    obelics,
    pages,
    pairs,
    prepare,
)
from data_pipelines.filters import Filters
from data_pipelines.preparation import Preparation
from data_pipelines.progress import Progress
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from data_pipelines.units import Recipe, Report, prepare_unit
from idefics_jax.errors import UserError
from tests.data_pipelines.pictures import png

ROOT = Path(__file__).parents[2]
RECIPE = Recipe("pairs", None, Filters(), captions=(), features={}, max_pixels=1_000_000, shard_mib=1)
SCHEMAS = {"pairs": pairs.SCHEMA, "obelics": obelics.SCHEMA, "cauldron": cauldron.SCHEMA}


def pair(caption, image: bytes | None = None) -> dict:
    return {"key": "0", "png": png(28, 28) if image is None else image, "caption": caption, "url": "x"}


def write(path: Path, rows: list[dict], kind: str = "pairs", **options) -> str:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMAS[kind]), path, **options)
    return str(path)


def several(folder: Path, files: int, rows: int) -> list[str]:
    """Writes files of pairs, the third row of each without a caption."""
    return [
        write(folder / f"{i}.parquet", [pair(None if row == 2 else f"{i} {row}") for row in range(rows)])
        for i in range(files)
    ]


def here(preparation: Preparation, max_bad_fraction: float = 0.5, *, keep_cut_short: bool = False) -> dict:
    """Prepares in this process; returns the manifest."""
    with preparation.begun():
        reports = [prepare_unit(unit) for unit in preparation.units]
        return preparation.finish(reports, max_bad_fraction, keep_cut_short=keep_cut_short)


def opened(inputs: list[str], output: Path, **changes) -> Preparation:
    return prepare.open_inputs(dataclasses.replace(RECIPE, **changes), inputs, output)


def command(*arguments, kind: str = "pairs") -> list[str]:
    return [sys.executable, "-m", "data_pipelines.prepare", "--kind", kind, *map(str, arguments)]


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files of a preparation that its inputs alone decide."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".array_record"} | {
        "manifest": (folder / manifest.MANIFEST).read_bytes()
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [("pairs", "pairs"), ("interleaved", "obelics"), ("conversations", "cauldron"), ("numbers", "cauldron")],
)
def test_training_reads_the_same_documents_from_shards_as_from_parquet(tmp_path, digits_folder, name, kind):
    path, root = str(digits_folder / f"{name}.parquet"), str(digits_folder)
    told = here(opened([path], tmp_path / "out", kind=kind, image_root=root))
    published = list(read_documents(SourceConfig(name, kind, (path,), image_root=root)))
    prepared = list(read_documents(SourceConfig(name, kind, (str(tmp_path / "out"),))))
    assert [document.parts for document in prepared] == [document.parts for document in published]
    assert told["documents"] == told["seen"] == len(published) > 0
    assert told["dropped"] == {}


@pytest.mark.parametrize(
    ("kind", "schema", "row"),
    [
        ("pdf", pages.SCHEMA, {"images": [{"bytes": png(30, 40), "path": None}], "texts": ["a page\nof lines"]}),
        ("text", chat_layouts.NEEDED[-3], {"question": "2 + 2?", "answer": "4"}),
    ],
)
def test_pages_and_conversations_come_back_from_shards_too(tmp_path, kind, schema, row):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row] * 3, schema=schema), path)
    here(opened([str(path)], tmp_path / "out", kind=kind))
    published = list(read_documents(SourceConfig("mine", kind, (str(path),))))
    prepared = list(read_documents(SourceConfig("mine", kind, (str(tmp_path / "out"),))))
    assert [document.parts for document in prepared] == [document.parts for document in published]


def test_any_number_of_processes_makes_the_same_bytes(tmp_path):
    inputs = several(tmp_path, files=3, rows=20)
    told = here(opened(inputs, tmp_path / "here"))
    for processes in (1, 2):
        preparation = opened(inputs, tmp_path / f"{processes}")
        made = prepare.prepare(preparation, processes=processes, max_bad_fraction=0.5, keep_cut_short=False)
        assert made == told
        assert contents(tmp_path / f"{processes}") == contents(tmp_path / "here")
    assert (told["documents"], told["seen"]) == (57, 60)
    assert told["dropped"] == {
        "null-text": {
            "documents": 3,
            "example": "0.parquet:2",
            "message": "it holds no caption; name other columns in captions, or drop the row",
        }
    }


def test_bad_rows_are_counted_by_reason_with_the_first_as_example(tmp_path):
    rows = [
        pair("good"),
        pair("none", b""),
        pair("cut", png(28, 28)[:20]),
        pair("cut too", png(28, 28)[:20]),
        pair("bomb", png(28, 28)[:16] + b"\x00\x00\xff\xff" * 2 + png(28, 28)[24:]),
        pair(""),
        pair("fine"),
    ]
    told = here(opened([write(tmp_path / "a.parquet", rows)], tmp_path / "out"), max_bad_fraction=0.8)
    found = {reason: (told["documents"], told["example"]) for reason, told in told["dropped"].items()}
    assert found == {
        "truncated": (2, "a.parquet:2"),
        "empty": (1, "a.parquet:1"),
        "bomb": (1, "a.parquet:4"),
        "null-text": (1, "a.parquet:5"),
    }
    kept = read_documents(SourceConfig("mine", "pairs", (str(tmp_path / "out"),)))
    assert [document.parts[-1].text for document in kept] == ["good", "fine"]


def test_rows_of_a_damaged_row_group_are_dropped_and_the_others_kept(tmp_path):
    rows = [pair(f"caption {i}" * 9) for i in range(30)]
    options = {"row_group_size": 10, "write_page_checksum": True, "compression": "none", "use_dictionary": False}
    path = Path(write(tmp_path / "a.parquet", rows, **options))
    data = bytearray(path.read_bytes())
    data[data.index(b"caption 15") + 9] ^= 1
    path.write_bytes(data)
    told = here(opened([str(path)], tmp_path / "out"))
    assert (told["documents"], told["seen"]) == (20, 30)
    assert told["dropped"]["damaged-parquet"]["documents"] == 10
    assert told["dropped"]["damaged-parquet"]["example"] == "a.parquet:10"


def test_inputs_that_break_off_are_refused_unless_told_otherwise_and_named_then(tmp_path):
    line = json.dumps({"question": "2 + 2?", "answer": "4"}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 10) + gzip.compress(line * 10)[:-4])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line * 10))
    inputs, out = [str(tmp_path / name) for name in ("a.jsonl.gz", "b.jsonl.gz")], tmp_path / "out"
    with pytest.raises(UserError, match=r"1 of 2 inputs break off, such as .*/a\.jsonl\.gz: .* --keep_cut_short"):
        here(opened(inputs, out, kind="text"))
    assert not (out / manifest.MANIFEST).exists()
    told = here(opened(inputs, out, kind="text"), keep_cut_short=True)
    assert [one["input"] for one in told["cut_short"]] == ["a.jsonl.gz"]
    assert (told["documents"], told["seen"], told["dropped"]) == (30, 30, {})
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 25))
    told = here(opened(inputs, out, kind="text"))
    assert (told["documents"], told["cut_short"]) == (35, [])


def test_a_parquet_file_without_a_footer_breaks_off_before_its_first_row(tmp_path):
    inputs = several(tmp_path, files=2, rows=10)
    Path(inputs[0]).write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 2 inputs break off, such as .*0.parquet is not a readable parquet file"):
        here(opened(inputs, tmp_path / "out"))
    told = here(opened(inputs, tmp_path / "out"), keep_cut_short=True)
    assert [one["input"] for one in told["cut_short"]] == ["0.parquet"]
    assert (told["documents"], told["seen"]) == (9, 10)


def test_the_share_of_bad_rows_is_of_those_that_there_are(tmp_path):
    preparation = opened([write(tmp_path / "a.parquet", [pair("x")] * 26 + [pair(None)] * 4)], tmp_path / "out")
    with pytest.raises(UserError, match=r"4 of 30 rows are bad .* more than --max_bad_fraction 0.1 allows"):
        here(preparation, max_bad_fraction=0.1)
    assert not (tmp_path / "out" / manifest.MANIFEST).exists()
    assert here(preparation, max_bad_fraction=0.14)["documents"] == 26


def test_too_many_bad_rows_stop_the_run_with_reasons_and_the_mend(tmp_path):
    inputs, out = [write(tmp_path / "a.parquet", [pair("x")] * 200 + [pair(None)] * 40)], tmp_path / "out"
    arguments = command("--input", *inputs, "--output", out, "--processes", 1)
    stopped = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert stopped.returncode == 2
    assert "rows are bad (null-text" in stopped.stderr
    assert "such as a.parquet:200" in stopped.stderr
    assert "--max_bad_fraction 0.01 allows" in stopped.stderr
    assert not (out / manifest.MANIFEST).exists()
    more = subprocess.run(
        [*arguments, "--max_bad_fraction", "0.5"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "200 documents with 200 images" in more.stdout
    assert "dropped 40: null-text" in more.stdout


def test_filters_drop_by_name_and_do_not_count_as_bad(tmp_path):
    rows = [pair("large"), pair("small", png(5, 28))]
    chosen = filters.parse("image_min_side=20")
    told = here(opened([write(tmp_path / "a.parquet", rows * 600)], tmp_path / "out", filters=chosen), 0.0)
    assert told["documents"] == 600
    assert told["dropped"] == {}
    assert told["filtered"]["filter:image_min_side"]["documents"] == 600
    assert told["asked"]["filters"] == {"image_min_side": 20}


@pytest.mark.parametrize("scores", [(2.5, None, 9.0, float("nan")), (None, None)])
def test_a_page_without_a_score_is_taken_and_counted(scores, tmp_path):
    schema = pa.schema([*obelics.SCHEMA, ("perplexity", pa.float64())])
    rows = [{"images": [None], "texts": ["words"], "perplexity": score} for score in scores]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    inputs, chosen = [str(tmp_path / "a.parquet")], Filters(document_max_perplexity=5.0)
    preparation = opened(inputs, tmp_path / "out", kind="obelics", filters=chosen)
    if 2.5 not in scores:
        with pytest.raises(UserError, match=r"none of 2 rows is a document \(filter:document_max_perplexity 2\)"):
            here(preparation)
        return
    told = here(preparation, 0.0)
    assert told["documents"] == 1
    assert told["filtered"]["filter:document_max_perplexity"]["documents"] == 3


def test_a_page_loses_the_images_that_filters_take_and_keeps_the_rest(tmp_path):
    (tmp_path / "a.png").write_bytes(png(40, 40))
    (tmp_path / "b.png").write_bytes(png(5, 28))
    row = {"images": ["a.png", None, "b.png", None], "texts": [None, "words", None, "more"]}
    inputs = [write(tmp_path / "a.parquet", [row], "obelics")]
    chosen = Filters(image_min_side=20)
    told = here(opened(inputs, tmp_path / "out", kind="obelics", image_root=str(tmp_path), filters=chosen))
    assert told["filtered_images"] == {"filter:image_min_side": 1}
    assert (told["documents"], told["images"]) == (1, 1)


def test_the_captions_of_pairs_and_a_perplexity_come_along(tmp_path):
    extra = [("synthetic", pa.string()), ("perplexity", pa.float32()), ("width", pa.int32())]
    schema = pa.schema([*pairs.SCHEMA, *extra])
    table = pa.Table.from_pylist([pair("a") | {"synthetic": "b", "perplexity": 2.5, "width": 3}], schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    told = here(opened([str(tmp_path / "a.parquet")], tmp_path / "out"))
    columns = {"image": "bytes", "caption": "text", "key": "text", "perplexity": "number"}
    assert told["columns"] == columns | {"synthetic": "text", "url": "text"}
    source = SourceConfig("mine", "pairs", (str(tmp_path / "out"),), captions=(("synthetic", 1.0),))
    (document,) = read_documents(source)
    assert document.parts[-1].text == "b"


def test_a_pair_is_kept_while_it_has_any_of_its_captions(tmp_path):
    schema = pairs.SCHEMA.append(pa.field("made", pa.string()))
    rows = [pair(alt) | {"made": made} for alt, made in (("a", None), (None, "b"), ("", "c"), (None, None))]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    told = here(opened([str(tmp_path / "a.parquet")], tmp_path / "out", captions=("caption", "made")))
    assert (told["documents"], told["dropped"]["null-text"]["documents"]) == (3, 1)
    captions = (("caption", 1.0), ("made", 1.0))
    source = SourceConfig("mine", "pairs", (str(tmp_path / "out"),), captions=captions)
    assert [document.parts[-1].text for document in read_documents(source)] == ["a", "b", "c"]


def test_fields_of_turns_that_training_does_not_read_are_left_behind(tmp_path):
    turn = {"user": "q", "assistant": "b", "choices": ["a", "b"], "when": datetime.datetime(2024, 1, 1)}
    row = {"images": [{"bytes": png(28, 28), "path": ""}], "texts": [turn]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    told = here(opened([path], tmp_path / "out", kind="cauldron"))
    assert (told["documents"], told["dropped"]) == (1, {})
    (published,) = read_documents(SourceConfig("mine", "cauldron", (path,)))
    (prepared,) = read_documents(SourceConfig("mine", "cauldron", (str(tmp_path / "out"),)))
    assert prepared.parts == published.parts


def test_verify_names_the_shards_whose_bytes_changed(tmp_path, capsys):
    out = tmp_path / "out"
    here(opened(several(tmp_path, files=2, rows=5), out))
    assert len(prepare.verify(out).shards) == 2
    shard = out / "00001-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1  # in what pads it: no reader would notice
    shard.write_bytes(data)
    with pytest.raises(UserError, match="00001-00000.array_record: not the bytes"):
        prepare.verify(out)


def test_progress_tells_rates_what_was_dropped_and_the_time_left():
    stream = io.StringIO()
    progress = Progress({3: 100, 4: 300}, stream)
    counted = {"null-text": {"documents": 2}, "filter:image_min_side": {"documents": 5}}
    reports = {3: Report(seen=9, documents=2, dropped=counted), 4: Report(seen=1, documents=1)}
    progress.show(reports, [3])  # too early for a line
    assert stream.getvalue() == ""
    progress.end(reports, [3])
    line = stream.getvalue()
    assert line.startswith("1 of 2 inputs: ")
    for part in (" documents/s, ", " images/s, ", " MiB/s, 2 dropped, 5 filtered, 0:00:00 left"):
        assert part in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "gone*.parquet"), "matches no file"),
        (("--input", "{folder}/a.txt"), "no reader is known for its name; give files that end in .parquet"),
        (("--input", "{folder}/pages.parquet"), "set kind to 'obelics'"),
        (("--input", "{folder}/torn.parquet"), "is not a readable parquet file"),
        (("--input", "{folder}/a.parquet", "--filters", "min_side=3"), "there is no filter 'min_side'"),
        (("--input", "{folder}/a.parquet", "--image_root", "{folder}/gone"), "is not for kind 'pairs'"),
        (("--input", "{folder}/a.parquet", "--captions", "made"), "a.parquet has no column made of texts, which"),
        (("--input", "{folder}/a.parquet", "--processes", "0"), "--processes is 0; it must be at least 1"),
        (("--input", "{folder}/a.parquet", "--max_bad_fraction", "2"), "--max_bad_fraction is 2.0"),
        (("--input", "{folder}/a.parquet", "--runner=DirectRunner"), "--runner needs Apache Beam"),
        (("--runner", "DirectRunner", "--shard_mib=5", "--filters", ""), "--shard_mib=5, --filters after --runner"),
        (("--input", "{folder}/a.parquet", "--input", "gone*.parquet"), "matches no file"),
        (("--input", "gone*.parquet", "--input", "{folder}/a.parquet"), "matches no file"),
        (("--input", "{folder}/a.parquet", "--filters", "", "--filters", ""), "--filters is given twice"),
        (("--input", "{folder}/a.parquet", "--shard_mib=256", "--shard_mib=5"), "--shard_mib is given twice"),
        (("--input", "{folder}/a.parquet", "--features", "a=b,a=c"), "names a field twice; give each one feature"),
        ((), "give --kind and --input, or --verify"),
        (("--verify",), "holds no manifest.json"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "a.txt").write_text("")
    write(tmp_path / "a.parquet", [pair("x")])
    write(tmp_path / "pages.parquet", [{"images": [None], "texts": ["words"]}], "obelics")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    given = [argument.format(folder=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", command("--output", tmp_path / "out", *given)[2:])
    with pytest.raises(SystemExit) as ended:
        prepare.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_in_a_sentence_and_mended_by_the_same_command(tmp_path):
    """A limit on the size of a file stands for a full disk: the write fails in the same place."""
    path, out = write(tmp_path / "a.parquet", [pair("x", png(300, 300))] * 40), tmp_path / "out"
    arguments = command("--input", path, "--output", out, "--processes", 1)
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 1000; exec "$@"', "limited", *arguments]
    stopped = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert stopped.returncode == 2
    assert "a shard cannot be written (" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    subprocess.run(arguments, cwd=ROOT, capture_output=True, check=True)
    assert json.loads((out / manifest.MANIFEST).read_bytes())["documents"] == 40


def test_a_folder_of_images_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--image_root is '.*/nowhere', which is no folder"):
        opened(several(tmp_path, files=1, rows=5), tmp_path / "out", image_root=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"document_max_missing_images": 1.0}, "not one of the images that 5 documents name has been found"),
        ({"document_max_missing_images": 1.0, "document_min_images": 1}, r"none of 5 rows .*document_min_images 5"),
        ({"document_max_missing_images": 0.5}, r"none of 5 rows .*document_max_missing_images 5"),
    ],
)
def test_a_folder_with_none_of_the_images_is_refused(tmp_path, chosen, message):
    (tmp_path / "empty").mkdir()
    rows = [{"images": [f"{i}.png", None], "texts": [None, f"text {i}"]} for i in range(5)]
    inputs = [write(tmp_path / "pages.parquet", rows, "obelics")]
    preparation = opened(
        inputs, tmp_path / "out", kind="obelics", image_root=str(tmp_path / "empty"), filters=Filters(**chosen)
    )
    with pytest.raises(UserError, match=message):
        here(preparation)
    assert not (tmp_path / "out" / manifest.MANIFEST).exists()
    for i in range(5):
        (tmp_path / "empty" / f"{i}.png").write_bytes(png(28, 28))
    assert here(preparation)["images"] == 5
