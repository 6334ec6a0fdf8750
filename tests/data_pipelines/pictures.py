"""Images for tests."""

import io

import numpy as np
import PIL.Image


def png(width: int, height: int) -> bytes:
    """Returns a PNG whose pixels depend on its size."""
    pixels = np.random.default_rng((width, height)).integers(0, 256, (height, width), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def damaged(data: bytes) -> bytes:
    """Returns a PNG whose header is right and whose pixels are not."""
    start = data.index(b"IDAT") + 10
    return data[:start] + bytes(len(data) - start)
