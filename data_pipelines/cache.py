"""A least-recently-used cache with a budget in bytes: what is read many times is prepared once."""

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Any


class Cache:
    """Keeps values that are costly to make, up to a number of bytes. Threads may share it.

    Attributes:
      keeps: whether it keeps anything.
    """

    def __init__(self, max_bytes: int):
        """`max_bytes` of 0 keeps nothing."""
        self.keeps = max_bytes > 0
        self._max_bytes = max_bytes
        self._bytes = 0
        self._values: collections.OrderedDict[Hashable, tuple[Any, int]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """Returns the value of a key, making it if it is not kept.

        Args:
          key: what the value depends on.
          make: makes it; two threads that ask at once may both do so.
          size: bytes that keeping it takes.
        """
        if not self.keeps:
            return make()
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value = make()
        taken = size(value)
        with self._lock:
            if key not in self._values:
                self._values[key] = value, taken
                self._bytes += taken
            while self._bytes > self._max_bytes:
                self._bytes -= self._values.popitem(last=False)[1][1]
        return value
