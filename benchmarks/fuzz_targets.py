"""What is fuzzed: whole files of each format, how they are damaged, and how they are read.

A reader here is what training or preparation does with a file, to the parts of a document. RejectedImage, BadRow and
UserError are refusals; so is a Rejected in the place of a row. Anything else is a fault.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import downloads, jsonl, manifest, readers, records, tar, training_form
from data_pipelines.cache import Cache
from data_pipelines.kinds import KINDS
from data_pipelines.rejection import BadRow, Rejected
from data_pipelines.row_groups import RowGroups
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import DocumentSource
from idefics_jax import decoding, image_gate
from idefics_jax.errors import UserError
from idefics_jax.images import ImageRules, RejectedImage, image_patches, image_size, patch_grids

REFUSALS = (UserError, BadRow)  # RejectedImage is a UserError
RULES = ImageRules(
    patch_size=14, longest_edge=112, shortest_edge=28, positions_per_side=8, split=True, max_pixels=4_000_000
)
# Numbers that lengths and sizes are often wrong by.
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
_MOST_CHANGES = 6


@dataclasses.dataclass(frozen=True)
class Target:
    """A format: whole files of it, and `read`, which returns whether it could be read or raises one of REFUSALS."""

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], bool]


def mutated(target: Target, name: str, seed: int, number: int) -> bytes:
    """Returns the number-th damaged file of a target; it depends on the arguments alone."""
    rng = random.Random(f"{seed}/{name}/{number}")
    data = bytearray(rng.choice(target.seeds))
    for _ in range(rng.randint(1, _MOST_CHANGES)):
        _change(data, rng, target.seeds)
    return bytes(data)


def _change(data: bytearray, rng: random.Random, seeds: tuple[bytes, ...]) -> None:
    """Changes a place or a range of a file."""
    first = rng.randrange(len(data) + 1)
    length = min(len(data) - first, int(2 ** rng.uniform(0, 10)))
    match rng.randrange(9):
        case 0 | 1 if length:
            data[first] ^= 1 << rng.randrange(8)
        case 2 if length:
            data[first] = rng.randrange(256)
        case 3 | 4:
            width, order = rng.choice("BHIQ"), rng.choice("<>")
            number = rng.choice(_NUMBERS) & (2 ** (8 * struct.calcsize(width)) - 1)
            data[first : first + struct.calcsize(width)] = struct.pack(order + width, number)
        case 5:
            del data[first : first + length]
        case 6:
            data[first:first] = data[first : first + length] * rng.randint(1, 3)
        case 7:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[first : first + length] = other[start : start + length]
        case 8 if rng.random() < 0.3:
            del data[first:]


def targets(folder: Path) -> dict[str, Target]:
    """Returns every target by name; `folder` takes the files of those that are read by name."""
    found = {form.lower(): Target(images(form), read_image) for form in ("JPEG", "PNG", "WEBP", "GIF")}
    for kind in KINDS:
        found[f"parquet-{kind}"] = Target(_parquets(kind), lambda data, kind=kind: _read_parquet(data, kind, folder))
    found["record"] = Target(_records(), _read_record)
    found["shard"] = _shard(folder)
    found["manifest"] = Target(_manifests(), lambda data: _read_manifest(data, folder))
    found["tar"] = Target(_tars(), lambda data: _read_rows(data, "pairs", folder / "a.tar", tar.read))
    found["jsonl"] = Target(_lines(), lambda data: _read_rows(data, "text", folder / "a.jsonl", jsonl.read))
    packed = tuple(gzip.compress(data, mtime=0) for data in _lines())
    found["jsonl.gz"] = Target(packed, lambda data: _read_rows(data, "text", folder / "a.jsonl.gz", jsonl.read))
    found["downloads-parquet"] = Target(
        _downloaded_parquets(), lambda data: _read_downloads(data, folder / "store.parquet")
    )
    found["downloads-tar"] = Target(_downloaded_tars(), lambda data: _read_downloads(data, folder / "store.tar"))
    return found


def images(form: str) -> tuple[bytes, ...]:
    """Returns images of one format, in the ways of storing that decoders have separate code for."""
    picture = PIL.Image.effect_mandelbrot((44, 36), (-2, -1, 1, 1), 30)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    ways: dict[str, list[tuple[str, dict]]] = {
        "JPEG": [("RGB", {}), ("RGB", {"progressive": True, "exif": turned}), ("L", {}), ("CMYK", {"comment": b"hi"})],
        "PNG": [("RGB", {}), ("RGBA", {}), ("P", {"transparency": 3}), ("1", {}), ("I;16", {}), ("LA", {})],
        "WEBP": [("RGB", {}), ("RGBA", {"lossless": True}), ("RGB", {"exif": turned}), ("RGB", {"save_all": True})],
        "GIF": [("P", {}), ("P", {"transparency": 3}), ("P", {"save_all": True}), ("L", {"interlace": True})],
    }
    found = []
    for mode, options in ways[form]:
        image, file = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode), io.BytesIO()
        if options.get("save_all"):
            options = {**options, "append_images": [image.rotate(90), image.rotate(180)]}
        image.save(file, form, **options)
        found.append(file.getvalue())
    return tuple(found)


def read_image(data: bytes) -> bool:
    """Reads an image as training does: measured by its header, then decoded, both ways there are, and cut."""
    width, height = image_size(data, RULES)
    if width * height > RULES.max_pixels:
        raise AssertionError(f"{width} x {height} pixels were let in")
    grids = patch_grids(data, RULES)
    pixels = _either(lambda: np.asarray(decoding.rgb_image(_opened(data))))
    if pixels != _either(lambda: decoding.rgb_array(decoding.Stored(data, max_pixels=RULES.max_pixels), channels=3)):
        raise AssertionError("an array and an image are decoded otherwise")
    return [len(found) for found in image_patches(data, RULES)] == [rows * columns for rows, columns in grids]


def _opened(data: bytes) -> PIL.Image.Image:
    return image_gate.open_image(data, max_pixels=RULES.max_pixels)


def _either(decode: Callable[[], np.ndarray]) -> bytes | str:
    """Returns the pixels, or the reason of a refusal."""
    try:
        return decode().tobytes()
    except RejectedImage as error:
        return error.reason


def _rows(kind: str) -> list[dict]:
    """Returns whole rows of a kind in the training form."""
    stored = [{"bytes": data, "path": None} for data in images("PNG")[:2]]
    turn = {"user": "what is it?", "assistant": "a picture", "source": "s"}
    said = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    return {
        "cauldron": [{"images": stored, "texts": [turn, turn]}, {"images": None, "texts": [turn]}],
        "obelics": [{"images": [None, b"GIF89a", None], "texts": ["one", None, "two"]}],
        "pairs": [{"image": stored[0]["bytes"], "caption": "words"}],
        "pdf": [{"images": stored, "texts": ["one\ntwo", "three"]}],
        "text": [{"messages": said}, {"messages": [{"role": "system", "content": "be brief"}, *said]}],
    }[kind]


def _parquets(kind: str) -> tuple[bytes, ...]:
    """Returns small parquet files with and without compression, dictionaries, statistics and checksums."""
    schema = next(schema for schema in reversed(KINDS[kind].NEEDED) if kind != "pairs" or "png" in schema.names)
    rows = [{"png" if name == "image" else name: value for name, value in row.items()} for row in _rows(kind)]
    table = pa.Table.from_pylist(rows * 3, schema=KINDS["text"].SCHEMA if kind == "text" else schema)
    found = []
    for compression, plain in (("snappy", False), ("zstd", True), ("none", True), ("gzip", False)):
        file = io.BytesIO()
        pq.write_table(
            table,
            file,
            row_group_size=2,
            compression=compression,
            use_dictionary=not plain,
            write_statistics=plain,
            write_page_checksum=compression == "gzip",
            data_page_version="2.0" if plain else "1.0",
        )
        found.append(file.getvalue())
    return tuple(found)


def _records() -> tuple[bytes, ...]:
    return tuple(records.encode(f"{kind}:{i}", row) for kind in KINDS for i, row in enumerate(_rows(kind)))


def _read_record(data: bytes) -> bool:
    """Reads a record as each kind in turn."""
    read = []
    for kind in KINDS:
        try:
            _make_parts(kind, records.decode(data, training_form.COLUMNS[kind])[1])
            read.append(True)
        except BadRow:
            read.append(False)
    return any(read)


def _shard(folder: Path) -> Target:
    """A shard whose manifest tells its new size, as if it had been prepared so."""
    rows = [records.encode(f"a:{i}", row) for i, row in enumerate(_rows("cauldron") * 4)]
    (whole,) = records.write_shards(rows, folder, prefix="whole", shard_bytes=2**30)

    def read(data: bytes) -> bool:
        home = folder / "prepared"
        home.mkdir(exist_ok=True)
        path = home / f"00000-00000{manifest.SUFFIX}"
        path.write_bytes(data)
        shard = manifest.Shard(path, whole.records, len(data), "0")
        (home / manifest.MANIFEST).write_bytes(_manifest("cauldron", [shard]))
        return _train_on(SourceConfig("mine", "cauldron", (str(home),)))

    return Target((whole.path.read_bytes(),), read)


def _manifest(kind: str, shards: list[manifest.Shard]) -> bytes:
    told = {
        "format": manifest.FORMAT,
        "kind": kind,
        "columns": training_form.COLUMNS[kind],
        "shards": [shard.told() for shard in shards],
        "digest": manifest.digest_of(shards),
    }
    return json.dumps(told, indent=1).encode()


def _manifests() -> tuple[bytes, ...]:
    shards = [manifest.Shard(Path(f"00000-{i:05}{manifest.SUFFIX}"), 7, 700, "a1" * 32) for i in range(3)]
    return tuple(_manifest("text", shards[:count]) for count in (0, 1, 3))


def _read_manifest(data: bytes, folder: Path) -> bool:
    home = folder / "manifests"
    home.mkdir(exist_ok=True)
    (home / manifest.MANIFEST).write_bytes(data)
    manifest.load(home)
    return True


def _tars() -> tuple[bytes, ...]:
    picture, found = images("PNG")[0], []
    fields = json.dumps({"caption": "words", "url": "http://a.b/c.png", "width": 3}).encode()
    for layout in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=layout) as archive:
            for name, content in (
                ("a.png", picture),
                ("a.txt", b"words"),
                ("a.json", fields),
                ("../b.png", picture),
                ("../b.txt", b"more"),
            ):
                info = tarfile.TarInfo(name if layout == tarfile.USTAR_FORMAT else "x" * 90 + "/" + "y" * 60 + name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        found.append(file.getvalue())
    return tuple(found)


_URLS = ("http://a.b/c.png", "http://a.b/d.png")


def _downloaded_parquets() -> tuple[bytes, ...]:
    """Returns what img2dataset writes with output_format=parquet."""
    found = []
    for column in ("jpg", "png", "webp"):
        rows = [
            {"url": url, "key": f"{i}", "status": "success", "sha256": hashlib.sha256(data).hexdigest(), column: data}
            for i, (url, data) in enumerate(zip(_URLS, images("PNG"), strict=False))
        ]
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([*rows, {**rows[0], "url": "e", "status": "failed", column: None}]), file)
        found.append(file.getvalue())
    return tuple(found)


def _downloaded_tars() -> tuple[bytes, ...]:
    """Returns what img2dataset writes with output_format=webdataset."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for i, (url, data) in enumerate(zip(_URLS, images("PNG"), strict=False)):
            fields = {"url": url, "key": f"{i:09}", "status": "success", "sha256": hashlib.sha256(data).hexdigest()}
            for suffix, content in (("png", data), ("json", json.dumps(fields).encode()), ("txt", b"words")):
                info = tarfile.TarInfo(f"{i:09}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return (file.getvalue(),)


def _read_downloads(data: bytes, path: Path) -> bool:
    """Finds the images of a file of a store, as its index is built, and checks them against their digests."""
    path.write_bytes(data)
    found = downloads.read(str(path), sha256="stored")
    return found is not None and not found.cut_short and len(found.images) == len(_URLS)


def _lines() -> tuple[bytes, ...]:
    layouts = (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a \ud83d\ude00"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": ["q", "a"]},
        {"instruction": "q", "input": "more", "output": "a"},
        {"question": "q", "answer": "a", "score": 1.5e3},
    )
    lines = [json.dumps(layout).encode() for layout in layouts]
    return (*lines, b"\n".join(lines), b"\xef\xbb\xbf" + b"\r\n".join(lines))


def _read_rows(data: bytes, kind: str, path: Path, read: Callable) -> bool:
    """Reads a file as preparation does, to the records of its rows."""
    path.write_bytes(data)
    whole = True
    for name, row in read(str(path), kind):
        try:
            if isinstance(row, Rejected):
                raise BadRow(row.reason, row.message)
            stored = training_form.training_row(kind, row, None, max_missing=None)
            _make_parts(kind, stored)
            records.encode(name, stored)
        except BadRow:
            whole = False
    return whole


def _read_parquet(data: bytes, kind: str, folder: Path) -> bool:
    """Reads a file as preparation does, then as training does."""
    path = folder / f"{kind}.parquet"
    whole = _read_rows(data, kind, path, readers.read_parquet)
    return _train_on(SourceConfig("mine", kind, (str(path),))) and whole


def _train_on(config: SourceConfig) -> bool:
    """Reads every row of a source once."""
    source = DocumentSource(
        config,
        prepare=lambda document: document,
        prepared_size=lambda document: 1,
        cache=Cache(0),
        row_groups=RowGroups(max_bytes=0),
        seed=0,
        shards=1,
        shards_here=1,
    )
    count = min(1000, int(source.group_rows.sum()))
    return not any(isinstance(piece, Rejected) for i in range(count) for piece in source.read(0, i))


def _make_parts(kind: str, row: dict) -> None:
    module = KINDS[kind]
    module.parts(row, None)
    for unit in range(min(3, module.units(row)) if module.units(row) > 1 else 0):
        module.parts(module.piece(row, unit, unit + 1), None)
