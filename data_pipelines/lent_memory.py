"""Memory that is lent as an array, and lent again once nobody looks at it.

A batch's patches are hundreds of megabytes, used for a step. Given back and asked for again, the system zeroes every
page of them first, which takes longer than to write the patches.
"""

import math
import weakref
from typing import Any

import numpy as np


class LentMemory:
    """Arrays of one shape, in as much memory as was ever looked at at once."""

    def __init__(self, shape: tuple[int, ...]):
        self._shape = shape
        self._free: list[np.ndarray] = []

    def lend(self) -> np.ndarray:
        """Returns uint8 of the shape with anything in it; its memory comes back with the last view, JAX's too."""
        memory = self._free.pop() if self._free else np.empty(math.prod(self._shape), np.uint8)
        lent = _Lent(memory.__array_interface__)
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return np.asarray(lent).reshape(self._shape)


class _Lent:
    """What numpy holds on to for an array and each of its views."""

    def __init__(self, interface: dict[str, Any]):
        self.__array_interface__ = interface
