"""From the bytes of an image to the patches the vision tower reads.

Follows Idefics2ImageProcessorPil of transformers 5.23: an image is optionally split into its four quarters and the
whole, each piece is resized alone (longest edge, then a floor on the shortest that may bend the aspect ratio,
bilinear), and cut into patches; pixels beyond the last whole patch are dropped, as the reference's convolution does.
Rescaling and normalisation are left to the device: patches stay uint8.

What the reference leaves open is settled here and in decoding.py: EXIF orientation is applied, 16-bit grey keeps its
high byte as 16-bit colour does, an animation is its first frame, and a side of one pixel is not split (both halves
are that pixel).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image

from idefics_jax import decoding, image_gate, resize
from idefics_jax.errors import UserError
from idefics_jax.image_gate import RejectedImage
from idefics_jax.pixel_room import PixelRoom

__all__ = [
    "ImageRules",
    "RejectedImage",
    "first_rejected",
    "image_patches",
    "image_size",
    "patch_grids",
    "position_ids",
]

RESIZERS = ("pillow", "simd")
# Above this Pillow itself warns of a decompression bomb.
_PILLOW_PIXELS = 89_478_485
# What is decoded at one time: as many pixels as the largest image may have in the recipes.
_ROOM = PixelRoom(64_000_000)


@dataclasses.dataclass(frozen=True)
class ImageRules:
    """How images become patches.

    Attributes:
      patch_size: side of a patch in pixels (14).
      longest_edge: pixels the longer side is brought down to (980).
      shortest_edge: pixels each side is brought up to (378).
      positions_per_side: rows and columns of the position table (70).
      split: whether an image is read as its four quarters and the whole.
      max_pixels: the most width * height that is decoded (64,000,000).
      resizer: "pillow", the reference to the bit, or "simd", four times as fast: see resize.py for how they differ.
    """

    patch_size: int
    longest_edge: int
    shortest_edge: int
    positions_per_side: int
    split: bool
    max_pixels: int
    resizer: str = "pillow"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "split":
                if not isinstance(value, bool):
                    raise UserError(f"images.split is {value!r}; it must be True or False")
            elif field.name == "resizer":
                if value not in RESIZERS:
                    raise UserError(f"images.resizer is {value!r}; it must be one of {', '.join(RESIZERS)}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"images.{field.name} is {value!r}; it must be a whole number of at least 1")
        if not self.patch_size <= self.shortest_edge <= self.longest_edge:
            raise UserError(
                f"images.shortest_edge is {self.shortest_edge}; it must lie between patch_size = {self.patch_size} "
                f"and longest_edge = {self.longest_edge}"
            )
        if self.longest_edge // self.patch_size > self.positions_per_side:
            raise UserError(
                f"images.longest_edge is {self.longest_edge}, {self.longest_edge // self.patch_size} patches of "
                f"{self.patch_size}; the position table has {self.positions_per_side} places a side, lower the edge"
            )
        if self.max_pixels > _PILLOW_PIXELS:
            raise UserError(f"images.max_pixels is {self.max_pixels}; Pillow lets at most {_PILLOW_PIXELS} through")

    @property
    def images_per_image(self) -> int:
        """How many images one becomes."""
        return 5 if self.split else 1


def image_size(data: bytes, rules: ImageRules) -> tuple[int, int]:
    """Returns (width, height) in pixels of the upright image, from its header; raises RejectedImage."""
    return decoding.Stored(data, max_pixels=rules.max_pixels).size


def patch_grids(data: bytes, rules: ImageRules, upscale: float = 1.0) -> list[tuple[int, int]]:
    """Returns (rows, columns) of patches of each image this one becomes, from its header; raises RejectedImage.

    `upscale` enlarges the image before the rules see its size.
    """
    patch = rules.patch_size
    return [
        (height // patch, width // patch) for _, (width, height) in _pieces(*image_size(data, rules), rules, upscale)
    ]


def image_patches(
    data: bytes, rules: ImageRules, upscale: float = 1.0, out: Sequence[np.ndarray] | None = None
) -> list[np.ndarray]:
    """Decodes an image and cuts it into patches; `upscale` as in `patch_grids`.

    Args:
      data: the image as it is stored.
      rules: how it becomes patches.
      upscale: as in `patch_grids`.
      out: arrays to write to, of the shapes returned and contiguous; by default new ones.

    Returns:
      One uint8 [rows * columns, patch_size**2 * 3] for each entry of `patch_grids`, in its order: patches in reading
      order, numbers within a patch in (row, column, channel) order.

    Raises:
      RejectedImage: the gate refuses the image, or its pixels are damaged; nothing was written then.
    """
    image = decoding.Stored(data, max_pixels=rules.max_pixels)
    pieces = _pieces(*image.size, rules, upscale)
    places = [None] * len(pieces) if out is None else out
    with _ROOM.taken(math.prod(image.size)):
        return [
            cut(pixels, rules.patch_size, place)
            for pixels, place in zip(_resized_pieces(image, pieces, rules.resizer), places, strict=True)
        ]


def first_rejected(images: Sequence[bytes], rules: ImageRules) -> tuple[int, RejectedImage] | None:
    """Returns the place of the first image that cannot be used, and why; None if all can."""
    for place, data in enumerate(images):
        try:
            image_patches(data, rules)
        except RejectedImage as error:
            return place, error
    return None


def _resized_pieces(image: decoding.Stored, pieces: list[tuple], resizer: str) -> Iterator[np.ndarray]:
    """Decodes an image once and yields its pieces as they are to be cut, uint8 [height, width, 3 or 4]."""
    if all((right - left, bottom - top) == size for (left, top, right, bottom), size in pieces):
        pixels = decoding.rgb_array(image, channels=3)
        for (left, top, right, bottom), _ in pieces:
            yield np.ascontiguousarray(pixels[top:bottom, left:right])
    elif resizer == "simd":
        pixels = decoding.rgb_array(image, channels=4)
        for box, size in pieces:
            yield resize.simd(pixels, box, size)
    else:
        rgb = decoding.rgb_image(image.opened)
        for box, size in pieces:
            yield resize.pillow(rgb, box, size)


def position_ids(rows: int, columns: int, positions_per_side: int) -> np.ndarray:
    """Returns int32 [rows * columns]: each patch's index into the position table, the grid stretched over all of it.

    As Idefics2VisionEmbeddings computes them.
    """
    down = _axis_positions(rows, positions_per_side)
    across = _axis_positions(columns, positions_per_side)
    return (down[:, None] * positions_per_side + across[None, :]).reshape(-1)


@functools.lru_cache(maxsize=1024)
def _axis_positions(count: int, positions: int) -> np.ndarray:
    """Buckets i / count into `positions` equal bins, in the reference's float32 steps.

    In whole numbers this is positions * i // count, but the reference rounds: at counts 25, 49, 50 and 55 of 70 some
    patches fall one bin lower, and the released weights were trained so. Of 70 the reference's boundaries are these
    on any machine; of some other table sizes (19 is the first) torch.arange rounds them by the machine's vector width.
    """
    boundaries = (1 / positions + np.arange(positions - 1) * (1 / positions)).astype(np.float32)
    fractions = np.arange(count, dtype=np.float32) * (np.float32(1) / np.float32(count))
    fractions = np.minimum(fractions, np.float32(1 - 1e-6))
    return np.searchsorted(boundaries, fractions, side="right").astype(np.int32)


def _pieces(width: int, height: int, rules: ImageRules, upscale: float) -> list[tuple[resize.Box, tuple[int, int]]]:
    """Returns what an image is read as: its quarters in reading order, then the whole.

    Each is its box (left, top, right, bottom), and the (width, height) it is resized to.
    """
    boxes = [(0, 0, width, height)]
    if rules.split:
        (left, right), (top, bottom) = _halves(width), _halves(height)
        boxes = [(x[0], y[0], x[1], y[1]) for y in (top, bottom) for x in (left, right)] + boxes
    return [(box, resized_size(box[2] - box[0], box[3] - box[1], rules, upscale)) for box in boxes]


def _halves(length: int) -> tuple[tuple[int, int], tuple[int, int]]:
    middle = length // 2
    return ((0, middle), (middle, length)) if middle else ((0, 1), (0, 1))


def resized_size(width: int, height: int, rules: ImageRules, upscale: float) -> tuple[int, int]:
    """Returns (width, height) that a piece is resized to, rounded as the reference rounds."""
    if upscale != 1.0:
        width, height = round(width * upscale), round(height * upscale)
    aspect = width / height
    longest = rules.longest_edge
    if width >= height and width > longest:
        width, height = longest, int(longest / aspect)
    elif height > width and height > longest:
        width, height = int(longest * aspect), longest
    return max(width, rules.shortest_edge), max(height, rules.shortest_edge)


def cut(pixels: np.ndarray, patch: int, out: np.ndarray | None = None) -> np.ndarray:
    """Cuts pixels into patches.

    Args:
      pixels: contiguous uint8 [h, w, 3], or [h, w, 4] of which the fourth byte is left out.
      patch: side of a patch.
      out: contiguous uint8 [rows * columns, patch * patch * 3] to write to; by default a new one.

    Returns:
      The patches, in reading order.
    """
    (height, width, channels), stride = pixels.shape, pixels.strides[0]
    rows, columns, size = height // patch, width // patch, patch * patch * 3
    if out is None:
        out = np.empty((rows * columns, size), np.uint8)
    if channels == 4:
        _cut_and_pack(pixels, patch, out)
        return out
    # A line of a patch is moved as one element; byte by byte numpy takes twice as long.
    line = np.dtype((np.void, patch * 3))
    lines = np.ndarray((rows, columns, patch), line, pixels, strides=(patch * stride, patch * 3, stride))
    out.view(line).reshape(rows, columns, patch)[...] = lines
    return out


def _cut_and_pack(pixels: np.ndarray, patch: int, out: np.ndarray) -> None:
    """Cuts four bytes a pixel into patches of three, in a third of the time that packing them first takes.

    Each pixel is written whole, and the next one over its fourth byte: numpy goes through an array in the order of the
    places that it writes to. The last row of patches, behind which there may be no byte of ours, is written by threes.
    """
    (height, width, _), stride = pixels.shape, pixels.strides[0]
    rows, columns, size = height // patch, width // patch, patch * patch * 3
    source, place = (patch * stride, patch * 4, stride, 4), (columns * size, size, patch * 3, 3)
    for first, end, element in ((0, rows - 1, np.uint32), (rows - 1, rows, np.dtype((np.void, 3)))):
        shape = (end - first, columns, patch, patch)
        found = np.ndarray(shape, element, pixels, first * source[0], source)
        np.ndarray(shape, element, out, first * place[0], place)[...] = found


def decode(data: bytes, rules: ImageRules) -> PIL.Image.Image:
    """Returns the upright RGB image; raises RejectedImage."""
    return decoding.rgb_image(image_gate.open_image(data, max_pixels=rules.max_pixels))
