"""The useful share of a batch: joint packing against padding as transformers does.

    python -m benchmarks.packing [--json FILE]

Three size mixes stand for published data (launch/mixes.py); then comes the embedded data, encoded by its own processor,
and the mixture of each of the paper's stages in its own rows (launch/stage_mixes.py), the mean of three virtual shards.
The first four have no cutting: documents that no row holds are told in the third column.

Row shapes of the mixes are ones a TPU would run. Tokens are of the paper's order (sequences of 2,048; 4,096 for web
pages, whose tail is long). Vision rows are multiples of 128, the block of the attention kernels, and short, because
attention is paid for every pair of patches within one: they hold three photographs (4,736), the largest image and a
small one (5,632), or two pages of 70 x 53 patches (7,424). Their number follows from the mix's patches per token.

Columns: documents rejected because no row holds them; useful share of tokens and of patches; pairs of patches that
attention computes over pairs within an image; rows a second that one core packs; and the useful shares where each
batch of 16 documents is padded to its longest text and its largest image height and width.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

from configs import digits as digits_config
from data_pipelines import digits
from data_pipelines.packing import Pool, Sizes, misfit, pack_row
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from idefics_jax import commands
from idefics_jax.batch import BatchShape
from idefics_jax.processor import Processor
from launch import report, stage_mixes
from launch.mixes import MIXES

_ROWS = flags.DEFINE_integer("rows", 1500, "rows to pack of each mix", lower_bound=1)

LOOKAHEAD = 512
ROUNDS = 40
PADDED_BATCH = 16
# Virtual shards of each stage, by whose chance what is full differs by a hundredth.
STAGE_SHARDS = 3
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


def measure(stream: Iterator, shape: BatchShape, rows: int, *, lookahead: int, rounds: int) -> Result:
    """Packs a stream of documents into `rows` rows, and pads the same documents.

    The pool is first turned over twice, so that what it prefers to keep waiting is in the figures.

    Args:
      stream: (tokens, [(rows, columns) of each image]) without end.
      shape: budgets of a row.
      rows: how many rows to measure.
      lookahead: documents that wait to be chosen from.
      rounds: see data_pipelines.packing.pack_row.
    """
    pool, seen, rejected, row = Pool(), [], 0, 0

    def next_row() -> list[Sizes]:
        nonlocal rejected, row
        while len(pool) < lookahead:
            document = next(stream)
            seen.append(document)
            sizes = Sizes(document[0], tuple(down * across for down, across in document[1]))
            if misfit(sizes, shape) is None:
                pool.add(sizes, sizes)
            else:
                rejected += 1
        row += 1
        placements = pack_row(pool, shape, rounds=rounds, rng=np.random.default_rng((0, row)))
        return [placement.item for placement in placements]

    placed = 0
    while placed < 2 * lookahead:
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
    streams = {
        name: (mix.documents(np.random.default_rng(0)), mix.shape, LOOKAHEAD, ROUNDS) for name, mix in MIXES.items()
    }
    streams["embedded"] = (embedded(np.random.default_rng(0)), EMBEDDED_SHAPE, LOOKAHEAD, ROUNDS)
    results = {
        name: measure(stream, shape, _ROWS.value, lookahead=lookahead, rounds=rounds)
        for name, (stream, shape, lookahead, rounds) in streams.items()
    }
    for name in stage_mixes.CONFIGS:
        found = []
        for seed in range(STAGE_SHARDS):
            stream, shape, lookahead, rounds = streams[name] = stage_mixes.stage(name, seed=seed)
            found.append(measure(stream, shape, _ROWS.value, lookahead=lookahead, rounds=rounds))
        results[name] = Result(*np.mean([dataclasses.astuple(one) for one in found], axis=0))
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
            for name, (_, shape, _, _) in streams.items()
        ],
    )
    numbers = {
        f"{field.name}_{name}": getattr(result, field.name)
        for name, result in results.items()
        for field in dataclasses.fields(result)
    }
    for names, prefix in ((tuple(MIXES) + ("embedded",), "useful"), (tuple(stage_mixes.CONFIGS), "stages_useful")):
        numbers[f"{prefix}_tokens"] = min(results[name].tokens for name in names)
        numbers[f"{prefix}_patches"] = min(results[name].patches for name in names)
        print(
            f"worst of {', '.join(names)}: {numbers[f'{prefix}_tokens']:.3f} of tokens and "
            f"{numbers[f'{prefix}_patches']:.3f} of patches are useful"
        )
    report.write_json(numbers)


if __name__ == "__main__":
    commands.run(main)
