"""Compiles generation for a TPU slice without one: how fast prompts are read and tokens are made, beside the roofline.

    python -m launch.aot_generate --config configs/idefics2_8b/instruct.py --slice v5e-8 [--json FILE]

Seconds are estimated as launch.aot does, and so printed with the error of a published training step, as none of
generation is known for these chips: the compiler's cycles, our kernels, and collectives that nothing hides, which
wait for bandwidth alone, though a token's are so small that what they take is mostly latency. The roofline is the least
time in which the slice can read what must be read, weights once and the filled part of the cache, and compute what must
be computed. A prompt is one image of 980 x 980 pixels in 256 tokens, answered in 128.
"""

import jax
from absl import flags

from idefics_jax import commands
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.plan import plan
from launch import generation, program
from launch.report import write_json
from launch.slice_flag import SLICE

_CONFIG = commands.define_config(None, "a recipe, whose model it is: configs/NAME.py[:argument]")
_BATCHES = flags.DEFINE_list("batches", ["1", "32"], "prompts answered at once")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for a TPU
    config = plan(TrainConfig.from_config_dict(_CONFIG.value.to_dict())).sizes
    try:
        write_json(generation.report(config, SLICE.value, [int(rows) for rows in _BATCHES.value]))
    except program.DoesNotFit as error:
        print(error)
        write_json({"fits": False})


if __name__ == "__main__":
    commands.run(main, required=("config", "slice"))
