"""Folders in a Cloud Storage bucket, gs://BUCKET/FOLDER, and what is done otherwise there than on a disk.

A bucket has no folders that could be renamed, and no file in it can be added to; but what is written into it is there
whole or not at all.
"""

import importlib.util
import os
import shutil
import tempfile
import time
from pathlib import Path

from etils import epath

from idefics_jax.errors import UserError

_SCHEME = "gs://"
# The most that is lost of a run's figures when it is killed; they also go with every checkpoint.
_SECONDS_BETWEEN_DELIVERIES = 60.0


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path names a place that is not on a disk of this machine."""
    return "://" in os.fspath(path)


def check(path: epath.PathLike) -> None:
    """Raises UserError for a place that is neither a disk nor a bucket, and where nothing here reads buckets."""
    if not is_remote(path):
        return
    if not os.fspath(path).startswith(_SCHEME):
        raise UserError(f"{path} is neither on a disk nor in a bucket; give a folder or {_SCHEME}BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path} needs gcsfs, which is not installed; install requirements-tpu.txt, or give a folder")


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a folder's absolute path; one in a bucket is so already. Raises UserError as `check` does."""
    check(path)
    return epath.Path(path) if is_remote(path) else epath.Path(path).expanduser().resolve()


def need_disk(path: epath.PathLike, what: str) -> None:
    """Raises UserError for a path in a bucket, where `what` is read from a disk alone."""
    if is_remote(path):
        raise UserError(f"{path}: {what} can only be read from a disk; mount the bucket (gcsfuse), or copy it first")


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file so that whoever looks finds it whole or not at all; an OSError names it."""
    if is_remote(path):
        path.write_bytes(content)
        return
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


class Outbox:
    """Files that grow on this machine and are delivered to a folder that may lie in a bucket.

    Attributes:
      path: where they are written: the folder itself if it is on a disk.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._remote = is_remote(folder)
        self.path = Path(tempfile.mkdtemp(prefix="idefics-")) if self._remote else Path(folder)
        self._sent: dict[Path, tuple[int, int]] = {}
        self._next = time.monotonic() + _SECONDS_BETWEEN_DELIVERIES

    def deliver(self) -> None:
        """Copies what has changed since the last time."""
        if not self._remote:
            return
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            state = (file.stat().st_mtime_ns, file.stat().st_size)
            if self._sent.get(file) != state:
                (self._folder / str(file.relative_to(self.path))).write_bytes(file.read_bytes())
                self._sent[file] = state
        self._next = time.monotonic() + _SECONDS_BETWEEN_DELIVERIES

    def deliver_now_and_then(self) -> None:
        """Copies what has changed, if the last time was a while ago."""
        if self._remote and time.monotonic() >= self._next:
            self.deliver()

    def close(self) -> None:
        """Copies what has changed, and removes this machine's copies."""
        self.deliver()
        if self._remote:
            shutil.rmtree(self.path)
