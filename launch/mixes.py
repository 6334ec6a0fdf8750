"""Size mixes that stand for published data: what packing meets, without the data.

Image sizes are log-normal; text lengths are log-normal around those of the data they stand for. A document is `<s>`,
its text, 66 tokens an image, `</s>`.
"""

import dataclasses
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from idefics_jax.batch import BatchShape
from idefics_jax.images import ImageRules, patch_grids

Grids = list[tuple[int, int]]

IMAGE_TOKENS = 66
# The released model's.
RULES = ImageRules(
    patch_size=14, longest_edge=980, shortest_edge=378, positions_per_side=70, split=False, max_pixels=64_000_000
)


@dataclasses.dataclass(frozen=True)
class Mix:
    """A published size mix.

    Attributes:
      side: median of the square root of an image's pixels.
      side_spread: standard deviation of the logarithm of an image's pixels.
      aspect: median of width over height.
      aspect_spread: standard deviation of its logarithm.
      images: mean images a document, at least 1 and geometric.
      text: mean tokens of text a document.
      text_spread: standard deviation of their logarithm.
      shape: the row it is packed into.
    """

    side: float
    side_spread: float
    aspect: float
    aspect_spread: float
    images: float
    text: float
    text_spread: float
    shape: BatchShape

    def documents(self, rng: np.random.Generator) -> Iterator[tuple[int, Grids]]:
        """Yields (tokens, [(rows, columns) of patches of each image]) of documents under RULES, without end."""
        while True:
            text, sizes = self.draw(rng)
            grids = [grid for size in sizes for grid in grids_of(size, RULES)]
            yield 2 + text + IMAGE_TOKENS * len(grids), grids

    def draw(self, rng: np.random.Generator) -> tuple[int, list[tuple[int, int]]]:
        """Returns a document's tokens of text, and (width, height) in pixels of its images."""
        sizes = [self._size(rng) for _ in range(rng.geometric(1 / self.images))]
        text = rng.lognormal(np.log(self.text) - self.text_spread**2 / 2, self.text_spread)
        return max(round(text), 4), sizes

    def _size(self, rng: np.random.Generator) -> tuple[int, int]:
        pixels = rng.lognormal(np.log(self.side**2), self.side_spread)
        aspect = rng.lognormal(np.log(self.aspect), self.aspect_spread)
        return max(round((pixels * aspect) ** 0.5), 1), max(round((pixels / aspect) ** 0.5), 1)


def grids_of(size: tuple[int, int], rules: ImageRules, upscale: float = 1.0) -> Grids:
    """Returns (rows, columns) of patches of each image that one of so many pixels (width, height) becomes."""
    return patch_grids(_png_header(*size), rules, upscale)


def _png_header(width: int, height: int) -> bytes:
    """Returns as much of a grey PNG as it takes to measure one."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    )


MIXES = {
    # COCO-like pairs: 640 x 480 and its turn, a caption of a dozen words. Mean of 1,513 patches.
    "pairs": Mix(
        side=545,
        side_spread=0.15,
        aspect=1.33,
        aspect_spread=0.25,
        images=1,
        text=15,
        text_spread=0.35,
        shape=BatchShape(rows=1, tokens=2048, vision_rows=8, patches=4736, images=32),
    ),
    # OBELICS-like pages: 353 M images and 115 G tokens in 141 M pages. Mean of 2,063 patches.
    "web": Mix(
        side=610,
        side_spread=0.95,
        aspect=1.3,
        aspect_spread=0.3,
        images=2.5,
        text=815,
        text_spread=0.9,
        shape=BatchShape(rows=1, tokens=4096, vision_rows=4, patches=5632, images=32),
    ),
    # Scanned pages and the text on them. Mean of 3,632 patches.
    "documents": Mix(
        side=1410,
        side_spread=0.6,
        aspect=0.75,
        aspect_spread=0.15,
        images=1,
        text=450,
        text_spread=0.7,
        shape=BatchShape(rows=1, tokens=2048, vision_rows=2, patches=7424, images=8),
    ),
}
