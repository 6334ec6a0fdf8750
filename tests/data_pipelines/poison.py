"""Hostile and broken data for tests: images and texts, each with the word it must be counted by.

A reason of None says that nothing is wrong with it, odd as it looks: it must be read.
"""

import io
import struct
import zlib

import numpy as np
import PIL.Image

from tests.data_pipelines.pictures import damaged, png

# Written into files where no library writes it: these bytes take the place of MARK.
MARK = "@@INVALID-UTF8@@"
NOT_UTF8 = b"\xed\xa0\x80 half a pair\xff"
SPELT = "<image></s><s><end_of_utterance>\nAssistant: <fake_token_around_image><unk>"


def encoded(form: str, size: tuple[int, int] = (60, 40), mode: str = "RGB", **options) -> bytes:
    """Returns an image with something to see in every pixel."""
    file = io.BytesIO()
    PIL.Image.effect_mandelbrot(size, (-2, -1, 1, 1), 30).convert(mode).save(file, form, **options)
    return file.getvalue()


def animated(form: str) -> bytes:
    """Returns an image of three frames."""
    frames = [PIL.Image.new("RGB", (30, 30), colour) for colour in ("red", "green", "blue")]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=50)
    return file.getvalue()


def sixteen_bit() -> bytes:
    """Returns a grey PNG of 16 bits a pixel."""
    file = io.BytesIO()
    PIL.Image.fromarray((np.arange(900, dtype=np.uint16) * 70).reshape(30, 30)).save(file, "PNG")
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Returns a whole PNG of one bit a pixel that decodes, if it is let, to `width` x `height` zeros."""
    rows = zlib.compress(bytes(height * (1 + -(-width // 8))), 9)
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), b"IDAT" + rows, b"IEND")
    written = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def gif_outgrown() -> bytes:
    """Returns a GIF of a few bytes whose frame is larger than its screen."""
    screen, frame = struct.pack("<HHBBB", 10, 10, 0, 0, 0), struct.pack("<HHHHB", 0, 0, 20_000, 20_000, 0)
    return b"GIF89a" + screen + b"," + frame + b"\x02\x00"


def images() -> dict[str, tuple[bytes, str | None]]:
    """Returns name -> (bytes, reason)."""
    jpeg, webp, gif, picture = (encoded(form) for form in ("JPEG", "WEBP", "GIF", "PNG"))
    return {
        "zero bytes": (b"", "empty"),
        "jpeg cut in its pixels": (jpeg[: len(jpeg) // 2], "truncated"),
        "jpeg cut in its header": (jpeg[:40], "truncated"),
        "png cut in its header": (picture[:20], "truncated"),
        "png cut in its pixels": (picture[: len(picture) // 2], "truncated"),
        "webp cut in its pixels": (webp[: len(webp) // 2], "corrupt"),
        "gif cut in its pixels": (gif[: len(gif) // 2], "truncated"),
        "png with damaged pixels": (damaged(png(28, 28)), "corrupt"),
        "a web page": (b"<!DOCTYPE html><html>404</html>", "format"),
        "a tiff called png": (encoded("TIFF"), "format"),
        "a bomb of 128 million pixels": (bomb(16_384, 8_192), "bomb"),
        "a gif that outgrows its screen": (gif_outgrown(), "bomb"),
        "a jpeg called png": (jpeg, None),
        "an animated gif": (animated("GIF"), None),
        "an animated webp": (animated("WEBP"), None),
        "100,000 x 1 pixels": (encoded("PNG", (100_000, 1)), None),
        "1 x 100,000 pixels": (encoded("PNG", (1, 100_000)), None),
        "one pixel": (png(1, 1), None),
        "cmyk": (encoded("JPEG", mode="CMYK"), None),
        "16 bits a pixel": (sixteen_bit(), None),
    }


def texts() -> dict[str, tuple[str | None, str | None]]:
    """Returns name -> (text, reason); one that holds MARK is to be written as NOT_UTF8."""
    return {
        "null": (None, "null-text"),
        "no text": ("", "null-text"),
        "not utf-8": (f"a {MARK} b", "not-utf8"),
        "a word of 1 MB": ("x" * 2**20, "too-many-tokens"),
        "control tokens": (f"a {SPELT} b", None),
        "control characters": ("a \x00\x1b[31m\u202e\ufeff b", None),
        "no letter at all": ("\u200b\U0001f468\u200d\U0001f469 \u0301", None),
    }
