"""A folder that is written whole or not at all: filled beside its place, then renamed into it.

In a bucket, which renames nothing, it is filled in its place: whoever writes it writes last what its readers ask for
first.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath
from jax.experimental import multihost_utils

from idefics_jax.buckets import is_remote
from idefics_jax.errors import UserError

# Attempts to remove what was not finished, and the pause between them.
_REMOVALS, _SECONDS_BETWEEN = 20, 0.1


@contextlib.contextmanager
def staged(path: epath.PathLike, *, replace: bool) -> Iterator[epath.Path]:
    """Yields an empty folder beside `path` that takes its place if the block ends well, and is removed if not.

    On a disk every file is flushed before the folder is renamed; in a bucket the folder is `path` itself. With several
    processes all of them enter and leave together; the first one makes, renames and removes.

    Args:
      path: the folder to write.
      replace: whether a `path` that is there already gives way; otherwise only an empty folder does.

    Raises:
      UserError: `path` is in the way, or cannot be written.
    """
    path = epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(path))
    if path.exists() and not replace and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already; choose another folder, or remove it first")
    try:
        with _in_place(path) if is_remote(path) else _beside(path) as folder:
            yield folder
    except OSError as error:
        raise UserError(
            f"could not write {path} ({error.strerror or error}); free some space or choose another folder"
        ) from error


@contextlib.contextmanager
def _beside(path: epath.Path) -> Iterator[epath.Path]:
    aside, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    first = jax.process_index() == 0
    try:
        if first:
            if old.exists() and not path.exists():  # a death between the two renames below
                old.rename(path)
            for left_over in (aside, old):
                _remove(left_over)
            aside.mkdir(parents=True)
        _wait_for_all(f"staged {path}")
        yield aside
        _wait_for_all(f"written {path}")
        if first:
            _flush(aside, below=True)
            if path.exists():
                path.rename(old)
            aside.rename(path)
            _flush(path.parent, below=False)
            _remove(old)
        _wait_for_all(f"renamed {path}")
    finally:
        if first:
            _remove_at_last(aside)


@contextlib.contextmanager
def _in_place(path: epath.Path) -> Iterator[epath.Path]:
    first, whole = jax.process_index() == 0, False
    try:
        if first:
            _remove(path)
        _wait_for_all(f"emptied {path}")
        yield path
        _wait_for_all(f"written {path}")
        whole = True
    finally:
        if first and not whole:
            _remove_at_last(path)


def _remove(path: epath.Path) -> None:
    if path.exists():
        path.rmtree()


def _remove_at_last(path: epath.Path) -> None:
    """Removes a folder that writers which have failed may still be making files in."""
    for _ in range(_REMOVALS):
        if not path.exists():
            return
        with contextlib.suppress(OSError):
            _remove(path)
        time.sleep(_SECONDS_BETWEEN)


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _flush(folder: epath.Path, *, below: bool) -> None:
    """Flushes a folder, and with `below` all that is in it, to the disk."""
    for path in [*(Path(folder).rglob("*") if below else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
