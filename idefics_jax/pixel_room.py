"""Room for the pixels that are decoded at one time, whatever the number of threads.

An image of 64 million pixels takes a gigabyte on its way to patches. Photographs are a hundredth of that and never wait
here; without it, memory would be that gigabyte times the number of threads for a shard of posters.
"""

import contextlib
import threading
from collections.abc import Iterator


class PixelRoom:
    """So many pixels; who wants more than are free waits for others to leave."""

    def __init__(self, pixels: int):
        self._all = self._free = pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Holds room for an image; one larger than all of it has it alone."""
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()
