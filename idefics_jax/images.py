"""From the bytes of an image to the patches the vision tower reads.

Follows Idefics2ImageProcessorPil of transformers 5.23: an image is optionally split into its four quarters and the
whole, each piece is resized alone (longest edge, then a floor on the shortest that may bend the aspect ratio, PIL
bilinear), and cut into patches; pixels beyond the last whole patch are dropped, as the reference's convolution does.
Rescaling and normalisation are left to the device: patches stay uint8.

What the reference leaves open is settled here: EXIF orientation is applied, 16-bit grey keeps its high byte as 16-bit
colour does, an animation is its first frame, and a side of one pixel is not split (both halves are that pixel).
"""

import dataclasses
import functools

import numpy as np
import PIL.Image

from idefics_jax import image_gate
from idefics_jax.errors import UserError
from idefics_jax.image_gate import RejectedImage

__all__ = ["ImageRules", "RejectedImage", "image_patches", "image_size", "patch_grids", "position_ids"]

# Above this Pillow itself warns of a decompression bomb.
_PILLOW_PIXELS = 89_478_485


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
    """

    patch_size: int
    longest_edge: int
    shortest_edge: int
    positions_per_side: int
    split: bool
    max_pixels: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "split":
                if not isinstance(value, bool):
                    raise UserError(f"images.split is {value!r}; it must be True or False")
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
    image = image_gate.open_image(data, max_pixels=rules.max_pixels)
    width, height = image.size
    return (height, width) if image_gate.swaps_sides(image_gate.transpose_of(image)) else (width, height)


def patch_grids(data: bytes, rules: ImageRules, upscale: float = 1.0) -> list[tuple[int, int]]:
    """Returns (rows, columns) of patches of each image this one becomes, from its header; raises RejectedImage.

    `upscale` enlarges the image before the rules see its size.
    """
    grids = []
    for left, top, right, bottom in _pieces(*image_size(data, rules), rules):
        width, height = _resized(right - left, bottom - top, rules, upscale)
        grids.append((height // rules.patch_size, width // rules.patch_size))
    return grids


def image_patches(data: bytes, rules: ImageRules, upscale: float = 1.0) -> list[np.ndarray]:
    """Decodes an image and cuts it into patches; `upscale` as in `patch_grids`.

    Returns:
      One uint8 [rows * columns, patch_size**2 * 3] for each entry of `patch_grids`, in its order: patches in reading
      order, numbers within a patch in (row, column, channel) order.

    Raises:
      RejectedImage: the gate refuses the image, or its pixels are damaged.
    """
    image = decode(data, rules)
    patches = []
    for box in _pieces(*image.size, rules):
        piece = image.crop(box)
        piece = piece.resize(_resized(*piece.size, rules, upscale), PIL.Image.Resampling.BILINEAR)
        patches.append(_cut(np.asarray(piece), rules.patch_size))
    return patches


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


def _pieces(width: int, height: int, rules: ImageRules) -> list[tuple[int, int, int, int]]:
    """Returns the boxes (left, top, right, bottom) an image is read as: quarters in reading order, then the whole."""
    whole = (0, 0, width, height)
    if not rules.split:
        return [whole]
    (left, right), (top, bottom) = _halves(width), _halves(height)
    return [(x[0], y[0], x[1], y[1]) for y in (top, bottom) for x in (left, right)] + [whole]


def _halves(length: int) -> tuple[tuple[int, int], tuple[int, int]]:
    middle = length // 2
    return ((0, middle), (middle, length)) if middle else ((0, 1), (0, 1))


def _resized(width: int, height: int, rules: ImageRules, upscale: float) -> tuple[int, int]:
    """Returns (width, height) after resizing, rounded as the reference rounds."""
    if upscale != 1.0:
        width, height = round(width * upscale), round(height * upscale)
    aspect = width / height
    longest = rules.longest_edge
    if width >= height and width > longest:
        width, height = longest, int(longest / aspect)
    elif height > width and height > longest:
        width, height = int(longest * aspect), longest
    return max(width, rules.shortest_edge), max(height, rules.shortest_edge)


def _cut(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Cuts uint8 [h, w, 3] into patches [rows * columns, patch * patch * 3]."""
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    grid = pixels[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * columns, patch * patch * 3)


def decode(data: bytes, rules: ImageRules) -> PIL.Image.Image:
    """Returns the upright RGB image."""
    image = image_gate.open_image(data, max_pixels=rules.max_pixels)
    turn = image_gate.transpose_of(image)
    rgb = image_gate.parse(image.format, lambda: _to_rgb(image))
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decodes to RGB with transparency laid on white, as the reference does."""
    image.load()
    if image.mode.startswith("I"):
        image = _high_byte(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _high_byte(image: PIL.Image.Image) -> PIL.Image.Image:
    """16-bit grey to 8-bit grey; Pillow's own conversion clips everything above 255 to white."""
    grey = np.asarray(image)
    shown = PIL.Image.fromarray((grey >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        shown.putalpha(PIL.Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    return shown
