"""Photographs of a chosen size, as prepared shards of image-text pairs.

The pictures come with scikit-image and scikit-learn: people, a cat, a cup, a street, a telescope's and a microscope's
views. Each is cropped to several aspect ratios and scaled to the wanted number of pixels, then stored as JPEG of
quality 90. Enlarged pictures have less detail than a camera's, and so fewer bytes a pixel to decode.
"""

import importlib.resources
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_sample_images

from data_pipelines import pairs, prepare
from data_pipelines.filters import Filters
from data_pipelines.units import Recipe

BUNDLED = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
# Width over height, as photographs are taken, and square.
ASPECTS = (4 / 3, 3 / 4, 3 / 2, 1.0)
QUALITY = 90
TEXT = "a photograph of the view from above with something small and bright near its left edge in the evening"
SHORTEST, LONGEST = 8, 40  # words of a caption


def photographs(megapixels: float) -> Iterator[bytes]:
    """Yields every picture at every aspect ratio, as JPEG."""
    pictures = [PIL.Image.fromarray(pixels) for pixels in load_sample_images().images]
    for name in BUNDLED:
        with importlib.resources.files("skimage.data").joinpath(name).open("rb") as file:
            pictures.append(PIL.Image.open(file).convert("RGB"))
    for picture, aspect in itertools.product(pictures, ASPECTS):
        width, height = round((megapixels * 1e6 * aspect) ** 0.5), round((megapixels * 1e6 / aspect) ** 0.5)
        inside = min(picture.width, picture.height * aspect), min(picture.height, picture.width / aspect)
        left, top = (picture.width - inside[0]) / 2, (picture.height - inside[1]) / 2
        box = (left, top, left + inside[0], top + inside[1])
        buffer = io.BytesIO()
        picture.resize((width, height), PIL.Image.Resampling.LANCZOS, box).save(buffer, "JPEG", quality=QUALITY)
        yield buffer.getvalue()


def write(folder: Path, megapixels: float) -> int:
    """Writes `folder/pairs.parquet` and prepares it as `folder/shards`; returns the mean bytes of a photograph."""
    rng, images = np.random.default_rng(0), list(photographs(megapixels))
    captions = [" ".join(rng.choice(TEXT.split(), rng.integers(SHORTEST, LONGEST + 1))) for _ in images]
    rows = [{"key": str(i), "png": None, "caption": text, "url": None} for i, text in enumerate(captions)]
    table = pa.Table.from_pylist(rows, pairs.SCHEMA).drop_columns("png").append_column("jpg", pa.array(images))
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "pairs.parquet")
    recipe = Recipe("pairs", None, Filters(), captions=(), features={}, max_pixels=64_000_000, shard_mib=256)
    preparation = prepare.open_inputs(recipe, [str(folder / "pairs.parquet")], folder / "shards")
    prepare.prepare(preparation, processes=1, max_bad_fraction=0.0, keep_cut_short=False)
    return sum(map(len, images)) // len(images)
