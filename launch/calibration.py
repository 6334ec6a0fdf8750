"""How far estimates are from steps that were timed: published steps of a 7B decoder, compiled and reckoned as ours are.

    python -m launch.calibration [--json FILE]

The decoder is Llama-2-7B, every parameter trained by AdamW, with as many rows a chip as were published. It is built of
our own parts, by the path that launch.aot takes: a recipe with another decoder, whose vision part, which cannot be
left out, is one narrow layer. What it gives stands in PUBLISHED, so that launch.aot prints it beside every estimate.
"""

import dataclasses

import jax
from ml_collections import ConfigDict

from configs.idefics2_8b import stage1
from idefics_jax import commands
from idefics_jax.training.config import TrainConfig
from launch import slices
from launch.compiled_step import compile_step, estimated
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
      estimated: that launch.calibration gives, with the libtpu of requirements-tpu.txt.
      source: where it is told.
    """

    slice: str
    rows: int
    tokens: int
    fsdp: int
    seconds: float
    estimated: float
    source: str

    @property
    def error(self) -> float:
        """Of the estimate, as a share of what was timed."""
        return self.estimated / self.seconds - 1


PUBLISHED = {
    # It was cut over 16 chips; with what we keep of the forward pass that takes 0.5 GiB more than a v4 has.
    "v4": Published("v4-512", 4, 2048, 64, 3.03, 1.984, "AXLearn, fuji.py: 7B v1 on v4-1024"),
    "v5e": Published("v5e-256", 1, 4096, 256, 2.21, 1.543, "AXLearn, fuji.py: 7B v2 on four v5e-256"),
    "v5p": Published("v5p-512", 4, 4096, 64, 2.5, 2.472, "AXLearn, arXiv 2507.05411, table 3: Llama-2-7B on v5p-512"),
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


def estimated_seconds(published: Published) -> float:
    """Compiles a published step, and returns the seconds that it is estimated to take."""
    config = TrainConfig.from_config_dict(decoder(published).to_dict())
    compiled = compile_step(config, published.slice, dump_to=None)
    return estimated(compiled, config, full_rows(config.data.shape), slices.find(published.slice)).seconds


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for a TPU
    table, numbers = [], {}
    for generation, published in PUBLISHED.items():
        seconds = estimated_seconds(published)
        table.append([published.source, published.seconds, seconds, seconds / published.seconds - 1])
        numbers[f"{generation}_estimated_over_published"] = seconds / published.seconds
    print_table(["published", "s", "estimated s", "error"], table)
    write_json(numbers)


if __name__ == "__main__":
    commands.run(main)
