"""How far estimates are from steps that were timed: published steps of a 7B decoder, compiled and reckoned as ours are.

    python -m launch.calibration [--json FILE]

The decoder is Llama-2-7B, every parameter trained by AdamW, with as many rows a chip as were published. It is built of
our own parts, by the path that launch.aot takes: a recipe with another decoder, whose vision part, which cannot be
left out, is one narrow layer. The command compiles the three, in eight minutes, and keeps what the compiler said in
published_steps.json; what follows from that is reckoned anew wherever an error is printed.
"""

import dataclasses
import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from configs.idefics2_8b import stage1
from idefics_jax import commands
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.plan import plan
from launch import slices
from launch.collectives import Collective
from launch.compiled_step import compile_step, seconds_of
from launch.program import Cost, Kernel, Operation
from launch.report import print_table, write_json
from launch.workload import full_rows


@dataclasses.dataclass(frozen=True)
class Published:
    """A timed step.

    Attributes:
      slice: what it is compiled for; slices that only add data parallelism are left out.
      rows: of each chip.
      tokens: of a row.
      fsdp: chips that the parameters are cut over.
      seconds: that it took.
      source: where it is told.
    """

    slice: str
    rows: int
    tokens: int
    fsdp: int
    seconds: float
    source: str


FILE = Path(__file__).with_name("published_steps.json")
PUBLISHED = {
    # It was cut over 16 chips; with what we keep of the forward pass that takes 0.5 GiB more than a v4 has.
    "v4": Published("v4-512", 4, 2048, 64, 3.03, "AXLearn, fuji.py: 7B v1 on v4-1024"),
    "v5e": Published("v5e-256", 1, 4096, 256, 2.21, "AXLearn, fuji.py: 7B v2 on four v5e-256"),
    "v5p": Published("v5p-512", 4, 4096, 64, 2.5, "AXLearn, arXiv 2507.05411, table 3: Llama-2-7B on v5p-512"),
}


def decoder(published: Published) -> ConfigDict:
    """Returns the recipe of a published step."""
    config = stage1.get_config()
    config.init_parts, config.lora, config.new_rows = ConfigDict(), {}, 0
    config.model.vision_config.update(
        {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    )
    config.model.perceiver_config.update({"resampler_n_latents": 8, "resampler_depth": 1})
    config.model.text_config.update(
        {"vocab_size": 32_000, "intermediate_size": 11_008, "num_key_value_heads": 32, "sliding_window": None}
    )
    config.partition = (("text_model/.*", "trainable", 1.0, 0.1), (".*", "frozen"))
    config.remat = config.vision_remat = "linear"  # all three kept the products
    config.rows_a_device = published.rows
    config.mesh = {"data": -1, "fsdp": published.fsdp}
    rows = published.rows * slices.find(published.slice).chips
    config.data.virtual_shards = rows
    config.data.shape.update(
        {"rows": rows, "tokens": published.tokens, "vision_rows": 1, "patches": stage1.IMAGE_SIDE**2, "images": 1}
    )
    return config


def cost_of(published: Published) -> Cost:
    """Compiles a published step."""
    return compile_step(TrainConfig.from_config_dict(decoder(published).to_dict()), published.slice, dump_to=None).cost


def kept(cost: Cost) -> dict[str, Any]:
    """Returns what an estimate is reckoned from, as plain JSON."""
    return {
        "libtpu": importlib.metadata.version("libtpu"),
        "cycles": cost.cycles,
        "collectives": [dataclasses.asdict(one) for one in cost.collectives],
        "kernels": [dataclasses.asdict(one) for one in cost.kernels],
    }


@functools.cache
def estimated_seconds(generation: str) -> float:
    """Returns the seconds that the published step of a generation is estimated to take, from what was kept of it."""
    told, published = json.loads(FILE.read_text())[generation], PUBLISHED[generation]
    cost = Cost(
        operations=(Operation("", False, told["cycles"]),),
        argument_bytes=0,
        peak_bytes=0,
        collectives=tuple(Collective(**one) for one in told["collectives"]),
        kernels=tuple(Kernel(**{**one, "shape": tuple(one["shape"])}) for one in told["kernels"]),
    )
    config = TrainConfig.from_config_dict(decoder(published).to_dict())
    return sum(seconds_of(cost, plan(config).sizes, full_rows(config.data.shape), slices.find(published.slice)))


def error(generation: str) -> float:
    """Returns how far the estimate of a generation's published step is off, as a share of what was timed."""
    return estimated_seconds(generation) / PUBLISHED[generation].seconds - 1


def sentence(generation: str) -> str:
    """Says it, for whoever reads an estimate."""
    timed = PUBLISHED[generation]
    off = f"{error(generation):+.1%} off the {timed.seconds} s timed"
    return f"the same reckoning of a published step ({timed.source}) is {off}"


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for a TPU
    told = {generation: kept(cost_of(published)) for generation, published in PUBLISHED.items()}
    FILE.write_text(json.dumps(told, indent=1) + "\n")
    print_table(
        ["published", "s", "estimated s", "error"],
        [[timed.source, timed.seconds, estimated_seconds(name), error(name)] for name, timed in PUBLISHED.items()],
    )
    write_json({f"{name}_estimated_over_published": 1 + error(name) for name in PUBLISHED})


if __name__ == "__main__":
    commands.run(main)
