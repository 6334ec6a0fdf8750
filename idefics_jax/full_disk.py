"""A disk that takes no more: seen before writing where its size tells, else known through a library's words.

Orbax, tensorstore and safetensors wrap the system's error in a ValueError, a RuntimeError or a type of their own, and
each of Orbax's threads logs it with its stack before it reaches who asked for the write. That one turns it into a
sentence; the others are dropped here.
"""

import errno
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from etils import epath

from idefics_jax.buckets import is_remote
from idefics_jax.errors import UserError

# What a user mends by making room or choosing another place.
_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


def check_room(path: epath.PathLike, tree: Any) -> None:
    """Stops before a tree of arrays is written to a local disk that has not the room for it.

    Raises:
      UserError: with the bytes it takes and those that are free.
    """
    if is_remote(path):
        return
    there = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    takes, free = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)), shutil.disk_usage(there).free
    if takes > free:
        raise UserError(
            f"{path} cannot be written: it takes {takes / 2**30:.2f} GiB and its disk has {free / 2**30:.2f} GiB free; "
            "make room for it and run the same command again"
        )


def os_error(error: BaseException) -> OSError | None:
    """Returns the OSError that a library has wrapped in words of its own, or None if it wraps none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    code = re.search(r"os[ _]error(?:_code=')? ?(\d+)", str(error))
    return None if code is None else OSError(int(code[1]), os.strerror(int(code[1])))


def refused(error: BaseException) -> str | None:
    """Returns the system's words if an error means that the disk takes no more, else None."""
    found = os_error(error)
    return found.strerror if found is not None and found.errno in _MENDABLE else None


class _SaidElsewhere(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and record.exc_info[1] is not None and refused(record.exc_info[1]))


_FILTER = _SaidElsewhere()


def say_once() -> None:
    """Keeps such errors out of the log from now on; who writes must turn them into a sentence."""
    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        logger.addFilter(_FILTER)
