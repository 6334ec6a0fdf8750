"""The index of an image store: where the image of each URL lies, sorted by a hash of the URL, in flat files.

It is built by parts of the hash, so that memory is bounded by a part and the number of URLs by the disk alone; it takes
64 bytes for each. What it is for, and how it is read: image_store.py.
"""

import collections
import contextlib
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipelines import downloads, folder_lock
from idefics_jax.errors import UserError

# The file that makes a folder an index, and those beside it: an item of each array for each URL, by the URL's hash.
HEAD = "image_store.json"
ARRAYS = {
    "high": np.dtype("<u8"),
    "low": np.dtype("<u8"),
    "place": np.dtype([("file", "<u4"), ("size", "<u4"), ("start", "<u8")]),  # downloads.DOWNLOAD
    "sha256": np.dtype("V32"),
}
FORMAT = 1
# Parts, by the first byte of the hash, that are sorted one by one: 4e8 URLs take 100 MB each.
_PARTS = 256
_UNSORTED = np.dtype([*((name, downloads.DOWNLOAD[name]) for name in downloads.DOWNLOAD.names), ("file", "<u4")])
_SECONDS_BETWEEN_LINES = 10.0


def build(paths: Sequence[str], folder: str, *, sha256: str, processes: int, keep_cut_short: bool) -> dict[str, int]:
    """Writes the index of a store; the folder appears once it is whole. Files that break off are named on stderr.

    Args:
      paths: the store's files.
      folder: to be made.
      sha256: which digests it gets, of downloads.DIGESTS.
      processes: that read the files; what is written is the same.
      keep_cut_short: whether tars may break off, and what comes before stays.

    Returns:
      Counts of `urls`, `repeated` (downloads of a URL that has one), `failed` and `cut_short` (files).

    Raises:
      UserError: the folder exists or is being made, a file cannot be read, nothing was downloaded, or tars break off
        and `keep_cut_short` is not given.
    """
    partial = Path(f"{os.path.normpath(folder)}.partial")
    _check_new(folder)
    with folder_lock.locked(partial):
        _check_new(folder)  # one that had the lock may have ended
        for left in partial.iterdir():
            if left.name != folder_lock.LOCK:
                left.unlink()
        counts = _fill(partial, paths, folder, sha256, processes, keep_cut_short)
        partial.rename(folder)
        Path(folder, folder_lock.LOCK).unlink()
    return counts


def _check_new(folder: str) -> None:
    if os.path.exists(folder):
        raise UserError(f"{folder} is there already; name a new folder, or delete it")


def _fill(
    partial: Path, paths: Sequence[str], folder: str, sha256: str, processes: int, keep_cut_short: bool
) -> dict[str, int]:
    """Writes the files of an index that is to be moved to a folder; returns the counts."""
    files, counts = [], collections.Counter(urls=0, repeated=0, failed=0, cut_short=0)
    with _Parts(partial) as parts:
        for path, found in _read_files(paths, sha256, processes):
            if found is None:
                continue
            parts.add(found.images, len(files))
            relative = os.path.relpath(path, folder)
            files.append({"path": relative, "bytes": os.path.getsize(path), "column": found.column})
            counts.update(failed=found.failed, cut_short=bool(found.cut_short))
            if found.cut_short:
                print(f"CUT SHORT: {path}: {found.cut_short}", file=sys.stderr, flush=True)
    if counts["cut_short"] and not keep_cut_short:
        raise UserError(
            f"{counts['cut_short']} of {len(paths)} files break off, which are named above; mend them, or give "
            "--keep_cut_short to keep what comes before"
        )
    _write_sorted(partial, counts)
    if not counts["urls"]:
        raise UserError(f"{', '.join(paths[:3])}: no image was downloaded; name what img2dataset wrote")
    head = {"format": FORMAT, "urls": counts["urls"], "sha256": sha256, "counts": dict(counts), "files": files}
    (partial / HEAD).write_text(json.dumps(head, indent=1))
    return dict(counts)


def _read_files(paths: Sequence[str], sha256: str, processes: int) -> Iterator[tuple[str, downloads.Downloads | None]]:
    """Yields each file with its images, in order."""
    read = functools.partial(downloads.read, sha256=sha256)
    started = told = time.monotonic()
    with contextlib.ExitStack() as stack:
        imap = map
        if processes > 1:
            imap = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes)).imap
        for number, found in enumerate(imap(read, paths), 1):
            yield paths[number - 1], found
            if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                left = (told - started) / number * (len(paths) - number)
                print(f"{number} of {len(paths)} files, {left:.0f} s left", file=sys.stderr, flush=True)


class _Parts:
    """Entries on their way to being sorted, in a file for each first byte of the hash."""

    def __init__(self, folder: Path):
        self._files = [open(_part(folder, number), "wb") for number in range(_PARTS)]  # noqa: SIM115 (closed below)

    def __enter__(self) -> "_Parts":
        return self

    def __exit__(self, *error) -> None:
        for file in self._files:
            file.close()

    def add(self, images: np.ndarray, file: int) -> None:
        """Adds the images of a file; entries of one hash keep the order in which they come."""
        entries = np.empty(len(images), _UNSORTED)
        for name in downloads.DOWNLOAD.names:
            entries[name] = images[name]
        entries["file"] = file
        part = (images["high"] >> np.uint64(56)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        ends = np.searchsorted(part[order], np.arange(_PARTS), side="right")
        for number, of_part in enumerate(np.split(entries[order], ends[:-1])):
            of_part.tofile(self._files[number])


def _part(folder: Path, number: int) -> Path:
    return folder / f"part{number:03d}.bin"


def _write_sorted(folder: Path, counts: collections.Counter[str]) -> None:
    """Turns the parts into the sorted arrays, without the later downloads of a URL; counts both."""
    for number in range(_PARTS):
        entries = np.fromfile(_part(folder, number), _UNSORTED)
        entries = entries[np.lexsort((entries["low"], entries["high"]))]  # stable
        first = np.ones(len(entries), bool)
        first[1:] = (entries["high"][1:] != entries["high"][:-1]) | (entries["low"][1:] != entries["low"][:-1])
        entries = entries[first]
        counts.update(urls=len(entries), repeated=int((~first).sum()))
        place = np.empty(len(entries), ARRAYS["place"])
        for name in place.dtype.names:
            place[name] = entries[name]
        columns = {"high": entries["high"], "low": entries["low"], "place": place, "sha256": entries["sha256"]}
        for name, column in columns.items():
            with open(folder / f"{name}.bin", "ab") as file:
                np.ascontiguousarray(column).tofile(file)
        _part(folder, number).unlink()
