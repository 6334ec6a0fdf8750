"""Time of our own kernels on a slice, which the compiler's estimates leave out: blocks of scores times cycles a block.

How many blocks a call computes depends on what lies in its rows (flash_attention.active_blocks), so it is counted in
rows packed as training packs them.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from idefics_jax.config import Idefics2Config
from idefics_jax.flash_attention import BLOCK, active_blocks
from idefics_jax.visibility import Visibility
from launch.chips import CHIPS
from launch.program import Kernel
from launch.workload import Rows

# Cycles that one core takes for a block of 256 x 256 pairs of one head, by the schedule that libtpu writes
# (benchmarks/kernel_schedule.py): the middle of what it takes at least and at most, at the released model's widest and
# narrowest heads, 72 and 128, which differ by less than 10 per cent.
CYCLES = {
    "v4": {"flash_attention_forward": 630, "flash_attention_backward": 1260},
    "v5e": {"flash_attention_forward": 420, "flash_attention_backward": 810},
    "v5p": {"flash_attention_forward": 410, "flash_attention_backward": 800},
}
# Operations a pair and a number of a head's width: two products forward, five backward.
OPERATIONS = {"flash_attention_forward": 4, "flash_attention_backward": 10}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Mean blocks of scores that a row has to compute, by the attention's length of queries and width of a head."""

    by_part: dict[str, float]

    @classmethod
    def of(cls, rows: Rows, config: Idefics2Config) -> "Blocks":
        """Counts them in packed rows: a vision row's, those of a row's latents, and a row's of text."""
        text = jnp.asarray(rows.segment_ids), jnp.asarray(rows.positions)
        images = jnp.asarray(rows.patch_image_ids)
        vision = images.reshape(-1, images.shape[-1])
        patches = images.reshape(images.shape[0], -1)
        owners = np.repeat(
            np.arange(1, int(images.max()) + 1, dtype=np.int32), config.perceiver_config.resampler_n_latents
        )
        owners = jnp.broadcast_to(jnp.asarray(owners), (len(images), len(owners)))
        seen = {
            "vision_model": Visibility(vision, vision),
            "connector": Visibility(owners, jnp.concatenate([patches, owners], axis=1)),
            "text_model": Visibility(text[0], text[0], text[1], text[1], config.text_config.sliding_window),
        }
        return cls({part: float(active_blocks(it).sum() / len(it.query_segments)) for part, it in seen.items()})


def part_of(kernel: Kernel, config: Idefics2Config) -> str:
    """Returns the part of the model whose heads have the width of a kernel's.

    Raises:
      ValueError: no part has.
    """
    widths = {
        config.vision_config.head_dim: "vision_model",
        config.perceiver_config.resampler_head_dim: "connector",
        config.text_config.head_dim: "text_model",
    }
    if kernel.name not in OPERATIONS or len(kernel.shape) != 4 or kernel.shape[2] not in widths:
        raise ValueError(f"nothing is known of the time of kernel {kernel.name} with result {kernel.shape}")
    return widths[kernel.shape[2]]


def cycles(kernels: Sequence[Kernel], blocks: Blocks, config: Idefics2Config, generation: str) -> dict[str, float]:
    """Returns the cycles that kernels take on each device, by part of the model."""
    found: dict[str, float] = {}
    each = CYCLES[generation]
    for kernel in kernels:
        part = part_of(kernel, config)
        rows, heads = kernel.shape[:2]
        own = kernel.count * rows * heads * blocks.by_part[part] * each[kernel.name] / CHIPS[generation].cores
        found[part] = found.get(part, 0.0) + own
    return found


def flops(kernels: Sequence[Kernel], blocks: Blocks, config: Idefics2Config) -> float:
    """Returns the operations that kernels do on each device, masked pairs of a block included."""
    return sum(
        kernel.count
        * kernel.shape[0]
        * kernel.shape[1]
        * blocks.by_part[part_of(kernel, config)]
        * BLOCK**2
        * OPERATIONS[kernel.name]
        * kernel.shape[2]
        for kernel in kernels
    )
