"""The gate every encoded image passes before a decoder sees it.

Three questions, cheapest first: is it one of four formats (first bytes), how many pixels does its header claim
(read here, with no library), and does the format's own parser agree. Only then may pixels be decoded. A bomb (a few
bytes that claim gigapixels) is refused at the second question, and the parsers of every other format Pillow knows
are never reached. Of a plain JPEG, most of what there is, all that its parser looks at is looked at here, in a
twentieth of the time.
"""

import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator

import PIL.Image

from idefics_jax.errors import UserError

JPEG, PNG, WEBP, GIF = "JPEG", "PNG", "WEBP", "GIF"

_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_SIDE_SWAPS = frozenset(_TRANSPOSES[tag] for tag in (5, 6, 7, 8))
# Start-of-frame markers: C0..CF without DHT (C4), JPG (C8) and DAC (CC), which share the range.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset((0x00, 0x01, 0xFF, *range(0xD0, 0xD9)))  # no length follows
_JPEG_SCAN_OR_END = (0xDA, 0xD9)
_JPEG_END = 0xD9
# Markers of plain JPEG: scan; frames of 8 bits, Huffman-coded; quantization tables; JFIF; and what Pillow skips.
_PLAIN_SCAN, _PLAIN_FRAMES, _PLAIN_TABLES, _PLAIN_JFIF = 0xFFDA, (0xFFC0, 0xFFC1, 0xFFC2), 0xFFDB, 0xFFE0
_PLAIN_SKIPPED = (0xFFC4, 0xFFDD, 0xFFFE)  # Huffman tables, restart interval, comment
# Segments, and fill bytes between them, that are walked: real files have dozens, and megabytes of them take seconds.
_JPEG_SEGMENTS = 10_000
# Bytes before the pixels. Pillow copies its EXIF once more for each of 64 KiB: a minute for 100 MB.
_JPEG_HEAD_BYTES = 16 * 2**20
# Every scan of a progressive JPEG goes over all pixels, and a hundred bytes make one more. Published files have ten; of
# an image of max_pixels so many are let in, of smaller ones more.
_JPEG_SCANS = 16
_JPEG_SCAN = b"\xff\xda"
# Frames that end with the first scan if that is of all layers: no more are read. Most photographs are such, and to
# count scans takes a millisecond a megabyte.
_JPEG_ONE_SCAN = (0xC0, 0xC1)
_ENDS_SCAN = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")
# What Pillow warns of is refused here (sizes), or no reason to lose an image (EXIF); a run would print it without end.
warnings.filterwarnings("ignore", module=r"PIL\.")


class RejectedImage(UserError):
    """An image that is not let in.

    Attributes:
      reason: one word to count by: empty, format, truncated, corrupt, bomb or too-many-patches.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return RejectedImage, (self.reason, str(self))  # survives the way back from a worker process


def open_image(data: bytes, *, max_pixels: int) -> PIL.Image.Image:
    """Returns the image with its header read and not a pixel decoded.

    Args:
      data: JPEG, PNG, WebP or GIF bytes.
      max_pixels: the most width * height that is let in.

    Raises:
      RejectedImage: the bytes are empty, of another format, cut short, damaged, or claim too many pixels.
    """
    kind = _kind(data)
    try:
        width, height = _HEADERS[kind](data)
    except (struct.error, IndexError):
        raise RejectedImage(
            "truncated", f"the {kind} image ends after {len(data)} bytes, inside its header; store the whole file"
        ) from None
    _check_size(kind, width, height, max_pixels)
    if kind == JPEG:
        _check_scans(data, width * height, max_pixels)
    image = parse(kind, lambda: PIL.Image.open(io.BytesIO(data), formats=[kind]))
    _check_size(kind, *image.size, max_pixels)  # the frame of a GIF may be larger than its screen
    return image


def plain_jpeg_size(data: bytes, *, max_pixels: int) -> tuple[int, int] | None:
    """Returns (width, height) of a JPEG of the plainest kind, which Pillow opens as an upright RGB image of that size.

    Returns:
      None for any other image: one of another format or colour, with EXIF, a profile or several pictures, damaged, or
      of more than max_pixels. `open_image` decides about those.
    """
    position, size, frame = 2, None, 0
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    for _ in range(_JPEG_SEGMENTS):
        head = data[position : position + 4]
        if len(head) < 4:
            return None
        marker, length = struct.unpack(">HH", head)
        segment = data[position + 4 : position + 2 + length]
        if len(segment) != length - 2:
            return None
        if marker == _PLAIN_SCAN:
            is_one = size is None or (frame in _JPEG_ONE_SCAN and segment[:1] == b"\x03")
            is_little = is_one or not _may_have_scans(data, math.prod(size), max_pixels)
            return size if is_little and position <= _JPEG_HEAD_BYTES else None
        if marker in _PLAIN_FRAMES and len(segment) == 15 and size is None:
            bits, height, width, layers = struct.unpack_from(">BHHB", segment)
            if (bits, layers) != (8, 3) or not 0 < width * height <= max_pixels:
                return None
            size, frame = (width, height), marker & 0xFF
        elif not (
            marker in _PLAIN_SKIPPED
            or (marker == _PLAIN_TABLES and len(segment) % 65 == 0 and max(segment[::65], default=0) < 16)
            or (marker == _PLAIN_JFIF and len(segment) >= 14)
        ):
            return None
        position += 2 + length
    return None


def parse(kind: str, read: Callable[[], PIL.Image.Image]) -> PIL.Image.Image:
    """Returns `read()`, with whatever Pillow raises on damaged bytes turned into RejectedImage."""
    try:
        return read()
    except PIL.Image.DecompressionBombError as error:  # a GIF whose first frame outgrows the screen it declares
        raise RejectedImage("bomb", f"the {kind} image is a decompression bomb ({error}); scale it down") from None
    except Exception as error:  # Pillow's parsers raise a dozen types, from struct.error to SyntaxError
        reason = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "corrupt"
        detail = "its header is damaged" if isinstance(error, PIL.UnidentifiedImageError) else str(error) or repr(error)
        raise RejectedImage(
            reason, f"the {kind} image cannot be read ({' '.join(detail.split())}); store it again from its source"
        ) from None


def transpose_of(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    """Returns the turn that brings the image upright, from the EXIF block of its header; None if there is none.

    Only what stands before the pixels counts, so that the size of an image is known without decoding it. EXIF that
    cannot be read is no reason to lose the image: it is shown as stored.
    """
    exif = PIL.Image.Exif()
    try:
        exif.load(image.info.get("exif"))
        return _TRANSPOSES.get(exif.get(_ORIENTATION_TAG))
    except Exception:
        return None


def swaps_sides(turn: PIL.Image.Transpose | None) -> bool:
    """Says whether a turn makes the width the height."""
    return turn in _SIDE_SWAPS


def _kind(data: bytes) -> str:
    if not data:
        raise RejectedImage("empty", "the image has 0 bytes; store the file's content, not only its name")
    if data.startswith(b"\xff\xd8\xff"):
        return JPEG
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GIF
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WEBP
    raise RejectedImage(
        "format", f"the image starts with {data[:8]!r}, which is not JPEG, PNG, WebP or GIF; convert it to one of them"
    )


def _check_size(kind: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise RejectedImage("corrupt", f"the {kind} image is {width} x {height}; both sides must be at least 1")
    if width * height > max_pixels:
        raise RejectedImage(
            "bomb",
            f"the {kind} image claims {width} x {height} pixels, more than max_pixels = {max_pixels}; "
            "scale it down or raise max_pixels",
        )


def _png_size(data: bytes) -> tuple[int, int]:
    return struct.unpack_from(">II", data, 16)


def _gif_size(data: bytes) -> tuple[int, int]:
    return struct.unpack_from("<HH", data, 6)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walks the segments to the start of the frame."""
    for marker, position in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return width, height
        if marker in _JPEG_SCAN_OR_END:
            raise RejectedImage("corrupt", "the JPEG image has no frame header before its pixels")
    raise IndexError


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields marker and place of each segment, up to where the bytes end; raises RejectedImage if there are too many.

    Raises:
      IndexError, struct.error: the bytes end within one.
    """
    position = 2
    for _ in range(_JPEG_SEGMENTS):
        position = data.find(b"\xff", position)
        if position < 0:
            return
        marker = data[position + 1]
        if marker in _JPEG_BARE:
            position += 1
            continue
        yield marker, position
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    raise RejectedImage("corrupt", f"the JPEG image has {_JPEG_SEGMENTS} segments before its pixels")


def _check_scans(data: bytes, pixels: int, max_pixels: int) -> None:
    """Raises RejectedImage for a JPEG that takes far longer to decode than its size tells."""
    scan, frame, layers = len(data), 0, -1
    try:
        for marker, position in _jpeg_segments(data):
            if marker in _JPEG_FRAMES:
                frame, layers = marker, data[position + 9]
            if marker in _JPEG_SCAN_OR_END:
                scan = position
                break
        is_one = frame in _JPEG_ONE_SCAN and data[scan + 4] == layers
    except (struct.error, IndexError):
        is_one = True  # it is cut short, which its parser tells
    if scan > _JPEG_HEAD_BYTES:
        raise RejectedImage("bomb", f"the JPEG image has {scan} bytes before its pixels; store it without its metadata")
    if is_one:
        return
    if _may_have_scans(data, pixels, max_pixels) and _scans(data, scan) * pixels > _JPEG_SCANS * max_pixels:
        raise RejectedImage("bomb", "the JPEG image has far more scans than it needs; store it again from its source")


def _may_have_scans(data: bytes, pixels: int, max_pixels: int) -> bool:
    """Whether a JPEG may have too many scans, by the bytes that each begins with, which metadata may hold as well."""
    return data.count(_JPEG_SCAN) * pixels > _JPEG_SCANS * max_pixels


def _scans(data: bytes, position: int) -> int:
    """Counts the scans of a JPEG from the place of the first one on."""
    count, found = 0, re.compile(re.escape(_JPEG_SCAN)).match(data, position)
    while found is not None and data[found.start() + 1] != _JPEG_END:
        count += data[found.start() + 1] == _JPEG_SCAN[1]
        length = int.from_bytes(data[found.end() : found.end() + 2])
        found = _ENDS_SCAN.search(data, found.end() + length)
    return count


def _webp_size(data: bytes) -> tuple[int, int]:
    """Reads the first chunk: lossy (VP8), lossless (VP8L) or extended (VP8X, the canvas)."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
        return 1 + low_width + (high_width << 16), 1 + low_height + (high_height << 16)
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise RejectedImage("corrupt", f"the WebP image starts with a chunk {chunk!r}, not VP8, VP8L or VP8X")


_HEADERS = {JPEG: _jpeg_size, PNG: _png_size, WEBP: _webp_size, GIF: _gif_size}
