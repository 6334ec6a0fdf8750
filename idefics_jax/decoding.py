"""From an image that passed the gate to upright pixels.

Pillow decodes as the reference does: transparency is laid on white, 16-bit grey keeps its high byte as 16-bit colour
does, an animation is its first frame. Colour JPEG that stands upright, most of what there is, takes a shorter way to
the same pixels, bit for bit: libjpeg-turbo, which Pillow uses too, straight into an array. Whatever it frowns at is
left to Pillow, so what is refused, and why, does not depend on the way.
"""

import functools

import numpy as np
import PIL.Image
import simplejpeg

from idefics_jax import image_gate
from idefics_jax.image_gate import RejectedImage
from idefics_jax.scratch import scratch

# Pixels that are laid on white at once.
_STRIP_PIXELS = 2**20

# Pillow takes memory for an image in blocks of 16 MiB, which malloc keeps for the thread that had them: 0.3 GiB for
# each thread that has once seen a large image. In one piece it goes back to the system.
PIL.Image.core.set_block_size(256 * 2**20)


class Stored:
    """An image as it is stored, let in by the gate.

    Attributes:
      data: its bytes.
      size: (width, height) of the upright image.
    """

    def __init__(self, data: bytes, *, max_pixels: int):
        """Raises RejectedImage as image_gate.open_image does."""
        self.data = data
        self._max_pixels = max_pixels
        plain_size = image_gate.plain_jpeg_size(data, max_pixels=max_pixels)
        self._is_plain = plain_size is not None
        self.size = plain_size or upright_size(self.opened)

    @functools.cached_property
    def opened(self) -> PIL.Image.Image:
        """As Pillow opens it."""
        return image_gate.open_image(self.data, max_pixels=self._max_pixels)

    def is_upright_colour_jpeg(self) -> bool:
        """Whether its pixels are right as libjpeg gives them."""
        return self._is_plain or (
            self.opened.format == image_gate.JPEG
            and self.opened.mode == "RGB"
            and image_gate.transpose_of(self.opened) is None
        )


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """Returns (width, height) of an image as the gate opens it, once it is turned upright."""
    width, height = image.size
    return (height, width) if image_gate.swaps_sides(image_gate.transpose_of(image)) else (width, height)


def rgb_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decodes an image as the gate opens it, to upright RGB of `upright_size`.

    Raises:
      RejectedImage: the pixels are damaged, or of another size than the header says.
    """
    turn, (width, height) = image_gate.transpose_of(image), upright_size(image)
    rgb = image_gate.parse(image.format, lambda: _to_rgb(image))
    rgb = rgb if turn is None else rgb.transpose(turn)
    if rgb.size != (width, height):
        raise RejectedImage(
            "corrupt",
            f"the {image.format} image is {rgb.width} x {rgb.height} and its header says {width} x {height}; "
            "store it again from its source",
        )
    return rgb


def rgb_array(image: Stored, *, channels: int) -> np.ndarray:
    """As `rgb_image`, to an array.

    Args:
      image: to decode.
      channels: 3, or 4 for a fourth byte that says nothing.

    Returns:
      uint8 [height, width, channels], contiguous. It may change when this thread decodes another image.
    """
    layout, (width, height) = ("RGBX" if channels == 4 else "RGB"), image.size
    pixels = _jpeg_array(image, layout) if image.is_upright_colour_jpeg() else None
    if pixels is None:
        pixels = np.frombuffer(rgb_image(image.opened).tobytes("raw", layout), np.uint8)
    return pixels.reshape(height, width, channels)


def _jpeg_array(image: Stored, layout: str) -> np.ndarray | None:
    """Decodes JPEG as it stands; returns None for a damaged one."""
    width, height = image.size
    pixels = scratch("decoded", (width * height * len(layout),))
    try:
        # Strict: what Pillow would only warn of raises.
        decoded = simplejpeg.decode_jpeg(image.data, layout, buffer=pixels, strict=True)
    except ValueError:
        return None
    return pixels if decoded.shape[:2] == (height, width) else None


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decodes to RGB with transparency laid on white, as the reference does."""
    image.load()
    if image.mode.startswith("I"):
        image = _high_byte(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """Lays transparency on white, a strip at a time: whole, it would take three copies of four bytes a pixel."""
    shown = PIL.Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = PIL.Image.new("RGBA", strip.size, "white")
        shown.paste(PIL.Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return shown


def _high_byte(image: PIL.Image.Image) -> PIL.Image.Image:
    """16-bit grey to 8-bit grey; Pillow's own conversion clips everything above 255 to white."""
    grey = np.asarray(image)
    shown = PIL.Image.fromarray((grey >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        shown.putalpha(PIL.Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    return shown
