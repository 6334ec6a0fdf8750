"""The useful share of a batch: joint packing against padding as transformers does.

    python -m benchmarks.packing [--json FILE]

Three size mixes stand for published data; the fourth is the embedded data, encoded by its own processor. Image sizes
of the mixes are log-normal, brought to patches by the released rules (longest edge 980, shortest 378, patches of 14);
text lengths are log-normal around those of the data they stand for. Each document is `<s>`, its text, 66 tokens an
image, `</s>`.

Row shapes are ones a TPU would run. Tokens are of the paper's order (sequences of 2,048; 4,096 for web pages, whose
tail is long). Vision rows are multiples of 128, the block of the attention kernels, and short, because attention is
paid for every pair of patches within one: they hold three photographs (4,736), the largest image and a small one
(5,504), or two pages of 70 x 52 patches (7,296). Their number follows from the mix's patches per token.

Columns: documents rejected because no row holds them; useful share of tokens and of patches; pairs of patches that
attention computes over pairs within an image; rows a second that one core packs; and the useful shares where each
batch of 16 documents is padded to its longest text and its largest image height and width.
"""

import dataclasses
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import report
from configs import digits as digits_config
from data_pipelines import digits
from data_pipelines.packing import Pool, Sizes, misfit, pack_row
from data_pipelines.sources import SourceConfig, read_documents
from idefics_jax import commands
from idefics_jax.batch import BatchShape
from idefics_jax.images import ImageRules, patch_grids
from idefics_jax.processor import Processor

_ROWS = flags.DEFINE_integer("rows", 500, "rows to pack of each mix", lower_bound=1)

LOOKAHEAD = 512
ROUNDS = 40
PADDED_BATCH = 16
IMAGE_TOKENS = 66
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

    def documents(self, rng: np.random.Generator) -> Iterator[list[tuple[int, int]]]:
        """Yields (tokens, [(rows, columns) of patches of each image]) without end."""
        while True:
            grids = [self._grid(rng) for _ in range(rng.geometric(1 / self.images))]
            text = rng.lognormal(np.log(self.text) - self.text_spread**2 / 2, self.text_spread)
            yield 2 + max(round(text), 4) + IMAGE_TOKENS * len(grids), grids

    def _grid(self, rng: np.random.Generator) -> tuple[int, int]:
        pixels = rng.lognormal(np.log(self.side**2), self.side_spread)
        aspect = rng.lognormal(np.log(self.aspect), self.aspect_spread)
        (grid,) = patch_grids(_png_header(round((pixels * aspect) ** 0.5), round((pixels / aspect) ** 0.5)), RULES)
        return grid


def _png_header(width: int, height: int) -> bytes:
    """Returns as much of a grey PNG as it takes to measure one."""
    header = b"IHDR" + struct.pack(">IIBBBBB", max(width, 1), max(height, 1), 8, 0, 0, 0, 0)
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
        shape=BatchShape(rows=1, tokens=4096, vision_rows=4, patches=5504, images=32),
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
        shape=BatchShape(rows=1, tokens=2048, vision_rows=2, patches=7296, images=8),
    ),
}
EMBEDDED_SHAPE = BatchShape(**{**digits_config.get_config().data.shape, "rows": 1})
EMBEDDED = {"pairs": "pairs", "interleaved": "obelics", "conversations": "cauldron", "numbers": "cauldron"}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a row of the table says; shares of 1."""

    rejected: float
    tokens: float
    patches: float
    attention: float
    rows_per_second: float
    padded_tokens: float
    padded_patches: float


def measure(stream: Iterator, shape: BatchShape, rows: int) -> Result:
    """Packs a stream of documents into `rows` rows, and pads the same documents.

    The pool is first turned over twice, so that what it prefers to keep waiting is in the figures.

    Args:
      stream: (tokens, [(rows, columns) of each image]) without end.
      shape: budgets of a row.
      rows: how many rows to measure.
    """
    pool, seen, rejected, row = Pool(), [], 0, 0

    def next_row() -> list[Sizes]:
        nonlocal rejected, row
        while len(pool) < LOOKAHEAD:
            document = next(stream)
            seen.append(document)
            sizes = Sizes(document[0], tuple(down * across for down, across in document[1]))
            if misfit(sizes, shape) is None:
                pool.add(sizes, sizes)
            else:
                rejected += 1
        row += 1
        placements = pack_row(pool, shape, rounds=ROUNDS, rng=np.random.default_rng((0, row)))
        return [placement.item for placement in placements]

    placed = 0
    while placed < 2 * LOOKAHEAD:
        placed += len(next_row())
    began = time.perf_counter()
    packed = [sizes for _ in range(rows) for sizes in next_row()]
    seconds = time.perf_counter() - began
    images = np.array([patches for sizes in packed for patches in sizes.images])
    vision_rows = rows * shape.vision_rows
    padded_tokens, padded_patches = pad(seen)
    return Result(
        rejected=rejected / len(seen),
        tokens=sum(sizes.tokens for sizes in packed) / (rows * shape.tokens),
        patches=images.sum() / (vision_rows * shape.patches),
        attention=vision_rows * shape.patches**2 / (images**2).sum(),
        rows_per_second=rows / seconds,
        padded_tokens=padded_tokens,
        padded_patches=padded_patches,
    )


def pad(documents: list) -> tuple[float, float]:
    """Returns the useful shares of tokens and patches where batches of documents are padded as transformers pads.

    A batch is as long as its longest document; an image takes the largest height times the largest width of the
    batch's images. Images that are all padding are not counted: transformers drops them before its vision tower.
    """
    tokens = patches = token_room = patch_room = 0
    for start in range(0, len(documents) - PADDED_BATCH + 1, PADDED_BATCH):
        batch = documents[start : start + PADDED_BATCH]
        grids = np.array([grid for _, images in batch for grid in images])
        tokens += sum(length for length, _ in batch)
        patches += grids.prod(1).sum()
        token_room += len(batch) * max(length for length, _ in batch)
        patch_room += len(grids) * grids.max(0).prod()
    return tokens / token_room, patches / patch_room


def embedded(rng: np.random.Generator) -> Iterator:
    """Yields documents of the embedded data in training's proportions, without end."""
    kinds = []
    with tempfile.TemporaryDirectory() as folder:
        digits.build(Path(folder) / "digits", seed=0, counts={name: 300 for name in digits.COUNTS})
        processor = Processor.load(Path(folder) / "digits" / "processor")
        for name, kind in EMBEDDED.items():
            path = f"{folder}/digits/{name}.parquet"
            source = SourceConfig(name, kind, (path,), image_root=f"{folder}/digits")
            encoded = [processor.encode(it.parts, add_bos=True, add_eos=True) for it in read_documents(source)]
            kinds += [[(len(document.tokens), list(document.grids)) for document in encoded]]
    shares = np.array([3.0 if name == "numbers" else 1.0 for name in EMBEDDED])
    while True:
        documents = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
        yield documents[rng.integers(len(documents))]


def main() -> None:
    streams = {name: (mix.documents(np.random.default_rng(0)), mix.shape) for name, mix in MIXES.items()}
    streams["embedded"] = (embedded(np.random.default_rng(0)), EMBEDDED_SHAPE)
    results = {name: measure(stream, shape, _ROWS.value) for name, (stream, shape) in streams.items()}
    report.print_table(
        [
            "mix",
            "T",
            "V x S",
            "rejected",
            "tokens",
            "patches",
            "attention",
            "rows/s",
            "padded tokens",
            "padded patches",
        ],
        [
            [name, shape.tokens, f"{shape.vision_rows} x {shape.patches}", *dataclasses.astuple(results[name])]
            for name, (_, shape) in streams.items()
        ],
    )
    numbers = {
        f"{field.name}_{name}": getattr(result, field.name)
        for name, result in results.items()
        for field in dataclasses.fields(result)
    }
    numbers["useful_tokens"] = min(result.tokens for result in results.values())
    numbers["useful_patches"] = min(result.patches for result in results.values())
    print(
        f"worst mix: {numbers['useful_tokens']:.3f} of tokens and {numbers['useful_patches']:.3f} of patches are useful"
    )
    report.write_json(numbers)


if __name__ == "__main__":
    commands.run(main)
