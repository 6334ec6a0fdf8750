"""What a run would train and hold, from shapes alone: no weight is made or read, so 8 billion of them fit anywhere."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from idefics_jax.errors import UserError
from idefics_jax.param_transforms import partition, quantize
from idefics_jax.param_tree import param_shapes
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.initial import from_sections, load_processor, model_config
from idefics_jax.training.optimizer import make_optimizer, peak_rates
from idefics_jax.training.run import starting_adapters
from idefics_jax.training.step import init_state


def plan(config: TrainConfig) -> str:
    """Returns the table that the start of the run would print, and the bytes of its parts over all devices.

    With a `model` section no file is read; otherwise the config.json of `init_from` and the processor.

    Raises:
      UserError: the settings do not fit the model.
    """
    # Any id of `<image>`: shapes do not depend on it.
    sizes = from_sections(config, image_token_id=1) if config.model else model_config(config, load_processor(config))
    params = param_shapes(sizes)
    try:
        adapters = jax.eval_shape(lambda tree: partition.combine(*starting_adapters(config, tree)), params)
        chosen = partition.choose(params, adapters, config.partition)
        base, frozen = partition.split(params, chosen)
        frozen = jax.eval_shape(
            lambda tree: quantize.cast(quantize.quantize(tree, config.quantize), jnp.dtype(config.frozen_dtype)), frozen
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    trainable = {name: tree for name, tree in (("params", base), ("adapters", adapters)) if tree}
    optimizer = make_optimizer(config.optimizer, trainable, chosen, config.steps)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), trainable)
    rates = peak_rates(config.optimizer, trainable, chosen)
    table = partition.table(partition.combine(base, frozen), adapters, chosen, rates)
    held = {
        "frozen parameters": frozen,
        "trained parameters, float32": state["trainable"],
        "optimizer state": state["opt_state"],
    }
    return "\n".join([table, *(f"{name}: {_size(tree)}" for name, tree in held.items())])


def _size(tree: Any) -> str:
    """Returns what a tree of shapes takes, in words."""
    count = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return f"{count:,} bytes ({count / 2**30:.2f} GiB)"
