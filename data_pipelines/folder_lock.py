"""A lock on a folder that a command fills: two at once are kept apart, and it ends with the process that holds it."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from idefics_jax.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder if it is not there, and holds it; raises UserError if another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another command is at work in {folder}; wait for its end") from None
        yield
