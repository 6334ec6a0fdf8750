"""What img2dataset wrote, file by file: where each image that was downloaded lies, and its URL.

Its two outputs (github.com/rom1504/img2dataset): parquet, a row for each URL with its status, and the image's bytes in
a column named after their format; and webdataset tars, `KEY.jpg`, `KEY.json` and maybe `KEY.txt` for each image, beside
a parquet file of the same name with the rows but not the bytes. Tars are read by their headers, from start to end.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import parquet
from data_pipelines.tar_members import BrokenTar, Member, members
from idefics_jax.errors import UserError

IMAGE_FORMATS = ("jpg", "png", "webp")
# Where an image lies: the bytes [start, start + size) of a tar, or row `start` of row group `size` of a parquet file;
# its URL by the halves of its hash; its digest, all zero where there is none.
DOWNLOAD = np.dtype([("high", "<u8"), ("low", "<u8"), ("start", "<u8"), ("size", "<u4"), ("sha256", "V32")])
NO_DIGEST = bytes(32)
DIGESTS = ("stored", "computed", "none")
# Images of each file that are held to the digests stored beside them, before the others' are believed.
_CHECKED = 100
_LARGEST_JSON = 2**20


@dataclasses.dataclass(frozen=True)
class Downloads:
    """The images of a file.

    Attributes:
      images: DOWNLOAD [images], in the order of the file.
      column: the parquet column of their bytes; None of a tar.
      failed: URLs that were not downloaded, and images without a URL.
      cut_short: the sentence that says where a tar breaks off, whose images before are there; empty if it does not.
    """

    images: np.ndarray
    column: str | None
    failed: int
    cut_short: str


@dataclasses.dataclass(frozen=True)
class _Found:
    url: str | None
    start: int
    size: int
    sha256: str | None
    load: Callable[[], bytes | None]


def key_of(url: str) -> tuple[int, int]:
    """Returns the 128-bit hash of a URL, in halves."""
    digest = hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:16])


def read(path: str, *, sha256: str) -> Downloads | None:
    """Finds the images of a file.

    Args:
      path: of a .parquet or .tar file.
      sha256: which digests are wanted, of DIGESTS: see image_store.py.

    Returns:
      The images; None if the file only accompanies a tar.

    Raises:
      UserError: it is no such file, or the digests it holds are not those of its images.
    """
    if path.endswith(".tar"):
        column, found = None, _in_tar(path)
    elif path.endswith(".parquet"):
        file = parquet.open_file(path)
        column = _image_column(file, path)
        if column is None:
            return None
        found = _in_parquet(file, column)
    else:
        raise UserError(f"{path} is neither .parquet nor .tar; name what img2dataset wrote with one of these formats")
    images, failed, cut_short, digests = [], 0, "", _Digests(path, sha256)
    try:
        for one in found:
            digest = None if one.url is None or one.size >= 2**32 else digests.of(one)
            if digest is None:
                failed += 1
            else:
                images.append((*key_of(one.url), one.start, one.size, digest))
    except BrokenTar as error:
        cut_short = f"{error}; download or write it again"
    except (*parquet.DAMAGED, UnicodeDecodeError, IndexError) as error:  # columns may differ in length
        raise UserError(f"{path} cannot be read ({error}); fetch it again or leave it out") from error
    digests.check()
    return Downloads(np.array(images, DOWNLOAD), column, failed, cut_short)


class _Digests:
    """The digests of a file's images, and whether those stored beside them are of them."""

    def __init__(self, path: str, wanted: str):
        self._path = path
        self._wanted = wanted
        self._checked = self._wrong = 0

    def of(self, image: _Found) -> bytes | None:
        """Returns the digest an image gets, of zeros if none; None if the image is not there."""
        if self._wanted == "computed":
            data = image.load()
            return None if data is None else hashlib.sha256(data).digest()
        if self._wanted == "none" or not image.sha256:
            return NO_DIGEST
        try:
            digest = bytes.fromhex(image.sha256)
        except ValueError:
            digest = b""
        if self._checked < _CHECKED:
            self._checked += 1
            self._wrong += hashlib.sha256(image.load() or b"").digest() != digest
        return digest if len(digest) == len(NO_DIGEST) else NO_DIGEST

    def check(self) -> None:
        """Raises UserError if one that was held to its image differs."""
        if self._wrong:
            raise UserError(
                f"{self._path}: {self._wrong} of its first {self._checked} images differ from the sha256 stored beside "
                "them, which img2dataset takes before it resizes or encodes; give --sha256 computed, or none"
            )


def _image_column(file: pq.ParquetFile, path: str) -> str | None:
    schema = file.schema_arrow

    def is_there(name: str, kind: pa.DataType) -> bool:
        return name in schema.names and parquet.reads_as(schema.field(name).type, kind)

    column = next((name for name in IMAGE_FORMATS if is_there(name, pa.binary())), None)
    if column is None and os.path.exists(Path(path).with_suffix(".tar")):
        return None
    if column is None or not is_there("url", pa.string()):
        told = ", ".join(f"{field.name} {field.type}" for field in schema)
        raise UserError(
            f"{path} has the columns {told}; it needs url string and one of {', '.join(IMAGE_FORMATS)} binary"
        )
    return column


def _in_parquet(file: pq.ParquetFile, column: str) -> Iterator[_Found]:
    schema = file.schema_arrow
    text = {field.name for field in schema if parquet.reads_as(field.type, pa.string())}
    names = [name for name in ("url", "status", "sha256") if name in text]
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=names)
        columns = {name: table.column(name).to_pylist() for name in names}

        @functools.cache
        def images(group: int = group) -> pa.ChunkedArray:
            return file.read_row_group(group, columns=[column]).column(column)

        for row in range(table.num_rows):
            url, digest = columns["url"][row], columns.get("sha256", {row: None})[row]
            there = columns["status"][row] == "success" if "status" in columns else images()[row].is_valid
            yield _Found(
                url if there else None, row, group, digest, lambda row=row, images=images: images()[row].as_py()
            )


def _in_tar(path: str) -> Iterator[_Found]:
    """Yields a sample's image once its last member has been passed; members of a sample follow one another."""
    accompanying = functools.cache(lambda: _accompanying(path))
    with open(path, "rb") as file:
        key, image, told = None, None, None
        for member in members(file):
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if (folder, stem) != key:
                if image is not None:
                    yield _sample(file, key, image, told, accompanying)
                key, image, told = (folder, stem), None, None
            if extension.lower() in IMAGE_FORMATS:
                image = member
            elif extension.lower() == "json" and member.size <= _LARGEST_JSON:
                told = _json(_bytes_of(file, member))
        if image is not None:
            yield _sample(file, key, image, told, accompanying)


def _sample(
    file: BinaryIO,
    key: tuple[str, str],
    image: Member,
    told: dict | None,
    accompanying: Callable[[], dict[str, dict]],
) -> _Found:
    told = accompanying().get(key[1], {}) if told is None else told
    url, digest = told.get("url"), told.get("sha256")
    there = isinstance(url, str) and told.get("status", "success") == "success"
    digest = digest if isinstance(digest, str) else None
    return _Found(url if there else None, image.offset, image.size, digest, lambda: _bytes_of(file, image))


def _accompanying(path: str) -> dict[str, dict]:
    """Returns the rows of the parquet file beside a tar, by key."""
    beside = Path(path).with_suffix(".parquet")
    if not beside.is_file():
        return {}
    file = parquet.open_file(str(beside))
    names = [name for name in ("key", "url", "status", "sha256") if name in file.schema_arrow.names]
    return {row.get("key"): row for row in file.read(columns=names).to_pylist()}


def _json(data: bytes) -> dict:
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _bytes_of(file: BinaryIO, member: Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset)
