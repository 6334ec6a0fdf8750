"""Memory that is written anew for every image, and kept for the next one.

Megabytes that are given back after each image are asked of the system again, which zeroes every page of them first:
a third of the time of an image of one megapixel, where the allocator happens to do so.
"""

import math
import threading

import numpy as np

# More than this is not kept, as every thread keeps its own: 4 megapixels of four bytes.
_MOST_BYTES = 2**24
_kept = threading.local()


def scratch(use: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a uint8 array with anything in it, the memory of which this thread gets again for the same use."""
    size, kept = math.prod(shape), vars(_kept)
    if size > _MOST_BYTES:
        return np.empty(shape, np.uint8)
    if use not in kept or kept[use].size < size:
        kept[use] = np.empty(size, np.uint8)
    return kept[use][:size].reshape(shape)
