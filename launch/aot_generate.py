"""Compiles generation for a TPU slice without one: how fast prompts are read and tokens are made, beside the roofline.

    python -m launch.aot_generate --config configs/idefics2_8b/instruct.py --slice v5e-8 [--json FILE]

Seconds are estimated as launch.aot does: the compiler's cycles, our kernels, and collectives that nothing hides, which
wait for bandwidth alone, though a token's are so small that what they take is mostly latency. The roofline is the least
time in which the slice can read what must be read, weights once and the filled part of the cache, and compute what must
be computed. A prompt is one image of 980 x 980 pixels in 256 tokens, answered in 128.
"""

import jax
from absl import flags

from idefics_jax import commands, sharding
from idefics_jax.config import Idefics2Config
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.plan import plan
from launch import estimate, generation, program, slices
from launch.estimate import gib
from launch.report import print_table, write_json
from launch.slice_flag import SLICE

_CONFIG = commands.define_config(None, "a recipe, whose model it is: configs/NAME.py[:argument]")
_BATCHES = flags.DEFINE_list("batches", ["1", "32"], "prompts answered at once")


def report(config: Idefics2Config, slice_name: str, batches: list[int]) -> dict[str, float]:
    """Prints a line for each program, and returns the numbers."""
    where, numbers, table = slices.find(slice_name), {}, []
    mesh = sharding.make_mesh({"tensor": -1}, program.slice_devices(slice_name))
    for rows in batches:
        costs, least = generation.compiled(config, rows, mesh), generation.least_seconds(config, rows, where)
        phases = ("prefill", generation.PROMPT["tokens"]), ("decode", 1)
        for (phase, tokens), cost, bound in zip(phases, costs, least, strict=True):
            took = generation.seconds(cost, config, where, bound)
            bare = estimate.exposed_seconds(cost, where)
            row = [1e3 * took, 1e3 * bound, took / bound, tokens * rows / took, 1e3 * bare, gib(cost.peak_bytes)]
            table.append([f"{phase}, batch {rows}", *row])
            numbers |= {f"{phase}_{rows}_seconds": took, f"{phase}_{rows}_roofline_seconds": bound}
            numbers[f"{phase}_{rows}_peak_gib"] = gib(cost.peak_bytes)
    print_table(
        [slice_name, "ms", "roofline, ms", "times it", "tokens a second", "bare collectives, ms", "peak GiB a chip"],
        table,
    )
    return numbers


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for a TPU
    config = plan(TrainConfig.from_config_dict(_CONFIG.value.to_dict())).sizes
    write_json(report(config, SLICE.value, [int(rows) for rows in _BATCHES.value]))


if __name__ == "__main__":
    commands.run(main, required=("config", "slice"))
