"""What the attention kernel computes beside what is needed, on each stage's mix, and the time that it takes.

    python -m benchmarks.vision_attention [--json FILE]

Each stage's own mixture (launch/stage_mixes.py) is packed as training packs it. The first table counts pairs of a query
and a key, over those that see each other: all of a row, as attention without skipping computes them; those that splash
attention's static mask leaves (the causal half for text, all elsewhere); and those of the kernel's blocks. The second
has the kernel's cycles a pair of blocks and head from its schedule (kernel_schedule.py), forward and backward, at
least and at most, and the time of a layer of the vision tower for one row of each stage, with the share of the chip's
peak that the pairs needed come to. Nothing is run; waiting for memory is not in it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_schedule
from idefics_jax import commands
from idefics_jax.flash_attention import BLOCK, active_blocks
from idefics_jax.visibility import Visibility
from launch import report, stage_mixes
from launch.chips import CHIPS
from launch.workload import Rows, packed_rows

LATENTS = 64
WINDOW = 4096
# Of the released model: query heads, key heads, numbers a head.
VISION, RESAMPLER, TEXT = (16, 16, 72), (16, 4, 96), (32, 8, 128)
SLICES = {"v4": "v4-8", "v5e": "v5e-8", "v5p": "v5p-8"}
PRODUCTS = {"forward": 2, "backward": 5}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of a query and a key in a row, on the mean."""

    needed: float
    all: float
    static: float
    blocks: float


def pairs(rows: Rows, most_images: int) -> dict[str, Pairs]:
    """Counts the pairs of the vision tower, the resampler and the decoder in packed rows, on the mean of a row.

    Args:
      rows: what belongs together in them.
      most_images: that a row has room for.
    """
    segments, positions, images = rows.segment_ids, rows.positions, rows.patch_image_ids
    count = len(segments)
    sizes = [np.bincount(ids.ravel())[1:].astype(float) for ids in images]
    owners = np.repeat(np.arange(1, most_images + 1, dtype=np.int32), LATENTS)
    owners = np.where(owners <= [[len(own)] for own in sizes], owners, 0)
    keys = np.concatenate([images.reshape(count, -1), owners], axis=1)
    vision = images.reshape(-1, images.shape[-1])
    seen = {
        "vision tower": Visibility(vision, vision),
        "resampler": Visibility(owners, keys),
        "decoder": Visibility(segments, segments, positions, positions, WINDOW),
    }
    needed = {
        "vision tower": sum((own**2).sum() for own in sizes),
        "resampler": sum((LATENTS * (own + LATENTS)).sum() for own in sizes),
        "decoder": np.minimum(positions[segments > 0] + 1, WINDOW).sum(),
    }
    found = {}
    for part, it in seen.items():
        queries, everything = it.query_segments.shape[1], float(it.query_segments.size * it.key_segments.shape[1])
        static = everything * (queries + BLOCK) / (2 * queries) if part == "decoder" else everything
        blocks = float(jnp.sum(active_blocks(jax.tree.map(jnp.asarray, it)))) * BLOCK**2
        found[part] = Pairs(*(x / count for x in (float(needed[part]), everything, static, blocks)))
    return found


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    numbers: dict[str, float] = {}
    counts, table, longest = {}, [], 0
    for stage, module in stage_mixes.CONFIGS.items():
        config = module.get_config()
        longest = max(longest, config.data.shape.patches)
        for part, of in pairs(packed_rows(config), config.data.shape.images).items():
            counts[stage, part] = of
            table.append(
                [f"{stage}, {part}", of.needed / 1e6, *(x / of.needed for x in (of.all, of.static, of.blocks))]
            )
            numbers[f"{stage}_{part.replace(' ', '_')}_computed_over_needed"] = of.blocks / of.needed
    report.print_table(["", "Mpairs needed a row", "all", "static mask", f"blocks of {BLOCK}"], table)
    print()
    table = []
    for name, slice_name in SLICES.items():
        chip = CHIPS[name]
        cycles = kernel_schedule.of(slice_name, kernel_schedule.Shape(longest, longest, *VISION))
        for kernel, each in cycles.items():
            row: list[object] = [f"{name}, {kernel}", each.least, each.most]
            for stage in stage_mixes.CONFIGS:
                of = counts[stage, "vision tower"]
                seconds = of.blocks / BLOCK**2 * VISION[0] * (each.least + each.most) / 2 / chip.cores / chip.clock
                ideal = 2 * PRODUCTS[kernel] * of.needed * VISION[0] * VISION[2] / chip.peak
                row += [1e3 * seconds, ideal / seconds]
                numbers[f"{name}_{kernel}_{stage}_ms"] = 1e3 * seconds
                numbers[f"{name}_{kernel}_{stage}_of_peak"] = ideal / seconds
            table.append(row)
    headings = [word for stage in stage_mixes.CONFIGS for word in (f"{stage} ms", "of peak")]
    print("A layer of the vision tower, a row of the batch on a chip; ms from the middle of least and most")
    report.print_table(["", "least cycles", "most", *headings], table)
    report.write_json(numbers)


if __name__ == "__main__":
    commands.run(main)
