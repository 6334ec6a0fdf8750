"""Images by URL: an index over what img2dataset downloaded, to be joined with rows that name images by their URLs.

    python -m data_pipelines.image_store --input 'images/*.tar' --output images/index [--sha256 computed]

makes a folder that a source's `image_root` may name. What is indexed is img2dataset's parquet or webdataset output
(downloads.py). Nothing is extracted, and no name in a tar becomes a path. Of several downloads of a URL the first that
succeeded counts, in the order of the files.

An index has an entry for each URL, sorted by a 128-bit hash, in flat files that are mapped into memory: a look-up
touches some tens of pages, whatever the number of URLs. URLs themselves are not kept: among 4e8 of them the chance that
any two share a hash is 2e-22, and to make one that has the hash of another takes 2^99 attempts: the hash is the URL.
A tar's image is read with one pread; a parquet file's takes its whole row group (100 images as img2dataset writes
them), so tars suit look-ups in random order.

Domains expire and are bought, and then serve other images. img2dataset can take the digests its URL list brings
(verify_hash) and drop what differs: its status says so, and only what succeeded is indexed. What is stored is held to
the digests of the index whenever it is read; where they come from, --sha256 says:

    stored    from the store, which is right only if images were kept as downloaded: img2dataset takes them before it
              resizes or encodes. Those of the first 100 images of each file are checked, so a mistake is seen.
    computed  from the images, which reads the whole store once.
    none      nothing is held to anything.
"""

import collections
import functools
import hashlib
import json
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
from absl import flags

from data_pipelines import downloads, parquet
from data_pipelines.downloads import NO_DIGEST, key_of
from data_pipelines.image_index import ARRAYS, FORMAT, HEAD, build
from data_pipelines.rejection import BadRow
from idefics_jax import commands
from idefics_jax.errors import UserError

WRONG_DIGEST = "wrong-digest"
# Files kept open, and row groups of parquet files kept in memory.
_OPEN_FILES = 64
_ROW_GROUPS = 8


@functools.cache
def opened(folder: str) -> "Images | None":
    """Returns the index of a folder, opened once a process; None if the folder holds none."""
    return Images(folder) if Path(folder, HEAD).is_file() else None


class Images:
    """The images of an index, by URL. Threads may share it."""

    def __init__(self, folder: str):
        """Opens an index; no file of the store is touched yet.

        Raises:
          UserError: the index is damaged or of another format.
        """
        self._folder = folder
        head = _read_head(folder)
        self._files = head["files"]
        self._arrays = {name: self._map(name, head["urls"]) for name in ARRAYS}
        self._tars: collections.OrderedDict[int, _Descriptor] = collections.OrderedDict()
        self._groups: collections.OrderedDict[tuple[int, int], pa.ChunkedArray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._arrays["place"])

    def __contains__(self, url: str) -> bool:
        return self._find(url) is not None

    def read(self, url: str) -> bytes:
        """Returns the bytes of the image that was downloaded from a URL.

        Raises:
          BadRow: there is none, its file cannot be read, or its bytes are not those that were indexed.
          UserError: its file has changed since it was indexed.
        """
        entry = self._find(url)
        if entry is None:
            raise BadRow("missing-image", f"the image {url!r} is not in {self._folder}; it was not downloaded")
        place = self._arrays["place"][entry]
        file, start, size = int(place["file"]), int(place["start"]), int(place["size"])
        try:
            data = self._read_tar(file, start, size) if self._files[file]["column"] is None else None
            data = self._read_group(file, size)[start].as_py() if data is None else data
        except (*parquet.DAMAGED, IndexError) as error:
            path = self._path(file)
            raise BadRow("missing-image", f"the image {url!r} cannot be read from {path} ({error})") from error
        if data is None:
            raise BadRow("missing-image", f"the image {url!r} is null in {self._path(file)}; it was not downloaded")
        expected = self._arrays["sha256"][entry].tobytes()
        if expected != NO_DIGEST and hashlib.sha256(data).digest() != expected:
            raise BadRow(WRONG_DIGEST, f"the image {url!r} is not what was indexed in {self._folder}; fetch it again")
        return data

    def _find(self, url: str) -> int | None:
        high, low = key_of(url)
        highs, lows = self._arrays["high"], self._arrays["low"]
        entry = int(np.searchsorted(highs, np.uint64(high)))
        while entry < len(highs) and highs[entry] == high:
            if lows[entry] == low:
                return entry
            entry += 1
        return None

    def _map(self, name: str, count: int) -> np.ndarray:
        path, expected = Path(self._folder, f"{name}.bin"), ARRAYS[name].itemsize * count
        if not path.is_file() or path.stat().st_size != expected:
            raise UserError(f"{path} does not have the {expected} bytes that {HEAD} tells of; build the index again")
        return np.asarray(np.memmap(path, ARRAYS[name], mode="r", shape=(count,)))  # memmap is slow to index

    def _path(self, file: int) -> str:
        return os.path.normpath(os.path.join(self._folder, self._files[file]["path"]))

    def _check_unchanged(self, file: int) -> None:
        path = self._path(file)
        if os.path.getsize(path) != self._files[file]["bytes"]:
            raise UserError(f"{path} has changed since {self._folder} was built; build the index again")

    def _read_tar(self, file: int, start: int, size: int) -> bytes:
        with self._lock:
            descriptor = self._tars.pop(file, None)
            if descriptor is None:
                self._check_unchanged(file)
                descriptor = _Descriptor(self._path(file))
            self._tars[file] = descriptor
            if len(self._tars) > _OPEN_FILES:
                self._tars.popitem(last=False)  # closed once no thread reads it any more
        data = os.pread(descriptor.number, size, start)
        if len(data) != size:
            raise OSError(f"it ends {size - len(data)} bytes too early")
        return data

    def _read_group(self, file: int, group: int) -> pa.ChunkedArray:
        """Returns the image column of a row group."""
        with self._lock:
            if (file, group) in self._groups:
                self._groups.move_to_end((file, group))
                return self._groups[file, group]
        self._check_unchanged(file)
        column = self._files[file]["column"]
        with parquet.open_file(self._path(file)) as opened_file:
            images = opened_file.read_row_group(group, columns=[column]).column(column)
        with self._lock:
            self._groups[file, group] = images
            if len(self._groups) > _ROW_GROUPS:
                self._groups.popitem(last=False)
        return images


class _Descriptor:
    """A file open for reading, closed with the last reference to it."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.number)


def _read_head(folder: str) -> dict:
    path = Path(folder, HEAD)
    try:
        head = json.loads(path.read_text())
        found = head["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); build the index again") from error
    if found != FORMAT:
        raise UserError(f"{path} has format {found!r}, not {FORMAT}; build the index again")
    return head


def main() -> None:
    paths = parquet.expand(_INPUT.value, where="--input")
    counts = build(
        paths,
        _OUTPUT.value,
        sha256=_SHA256.value,
        processes=_PROCESSES.value,
        keep_cut_short=_KEEP_CUT_SHORT.value,
    )
    print(f"{_OUTPUT.value} of {len(paths)} files: {', '.join(f'{name} {count}' for name, count in counts.items())}")


if __name__ == "__main__":
    _INPUT = flags.DEFINE_multi_string("input", None, "files that img2dataset wrote, a path or glob; may be repeated")
    _OUTPUT = flags.DEFINE_string("output", None, "folder of the index, to be made")
    _SHA256 = flags.DEFINE_enum("sha256", "stored", downloads.DIGESTS, "where the images' digests come from")
    _PROCESSES = flags.DEFINE_integer("processes", 1, "processes that read the files", lower_bound=1)
    _KEEP_CUT_SHORT = flags.DEFINE_boolean("keep_cut_short", False, "keep what precedes where a tar breaks off")
    commands.run(main, required=("input", "output"))
