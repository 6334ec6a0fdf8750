"""What a run would train and hold, from shapes alone: no weight is made or read, so 8 billion of them fit anywhere."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from idefics_jax import settings, sharding
from idefics_jax.config import Idefics2Config
from idefics_jax.errors import UserError
from idefics_jax.images import ImageRules
from idefics_jax.param_transforms import lora, new_rows, partition, paths, quantize
from idefics_jax.param_tree import abstract_params
from idefics_jax.training.checkpoint import with_shardings
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.initial import check_random, from_sections, load_processor, model_config
from idefics_jax.training.optimizer import make_optimizer, peak_rates
from idefics_jax.training.step import init_state, state_axes


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run in shapes; `str` tells it as the start of the run does, and what it takes over all devices.

    Attributes:
      sizes: of the model.
      optimizer: the gradient transformation.
      state, frozen: what the step is given (training/step.py), as ShapeDtypeStructs.
      state_axes, frozen_axes: the logical axes of their leaves.
      chosen: the rule of each leaf of parameters and adapters, by path.
      table: every leaf with its shape, dtype, state, learning rate and decay.
      devices: how many of them the mesh takes, in words.
    """

    sizes: Idefics2Config
    optimizer: optax.GradientTransformation
    state: dict[str, Any]
    frozen: dict[str, Any]
    state_axes: dict[str, Any]
    frozen_axes: dict[str, Any]
    chosen: dict[str, partition.Rule]
    table: str
    devices: str

    def __str__(self) -> str:
        held = {
            "frozen parameters": self.frozen,
            "trained parameters, float32": self.state["trainable"],
            "optimizer state": self.state["opt_state"],
        }
        return "\n".join([self.table, *(f"{name}: {_size(tree)}" for name, tree in held.items()), self.devices])

    def placed(self, mesh: Mesh, rules: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns state and frozen parameters with their places on a mesh: what the step is compiled against."""
        return tuple(
            with_shardings(tree, sharding.tree_shardings(mesh, axes, rules))
            for tree, axes in ((self.state, self.state_axes), (self.frozen, self.frozen_axes))
        )


def plan(config: TrainConfig, *, start: Idefics2Config | None = None) -> Plan:
    """Lays a run out.

    With a `model` section no file is read; otherwise the config.json of `init_from` and the processor. The plan of a
    pod may be looked at anywhere, so the devices that are there are not counted; how many it needs is said.

    Args:
      config: the settings.
      start: sizes of the model in `init_from`, where it is yet to be written.

    Raises:
      UserError: the settings do not fit the model, nothing would train, or the mesh cannot be made of any devices.
    """
    # Any id of `<image>`: shapes do not depend on it.
    if config.model:
        sizes = from_sections(config, image_token_id=1)
    else:
        sizes = model_config(config, load_processor(config), start=start)
    settings.check_names(
        config.image_rules, [field.name for field in dataclasses.fields(ImageRules)], "config.image_rules"
    )
    return lay_out(config, sizes)


def lay_out(config: TrainConfig, sizes: Idefics2Config) -> Plan:
    """Lays a run of a model of these sizes out.

    Raises:
      UserError: the settings do not fit the model, nothing would train, or the mesh cannot be made of any devices.
    """
    several = "a multiple of " if -1 in config.mesh.values() else ""
    devices = f"mesh {dict(config.mesh)}: {several}{sharding.fixed_devices(config.mesh)} device(s)"
    (params, axes), dtype = abstract_params(sizes), jnp.dtype(config.frozen_dtype)
    try:
        check_random(config, params)
        parts = starting_adapters(config, params)
        adapters = jax.eval_shape(partition.combine, *parts)  # in the order in which a run has them
        chosen = partition.choose(params, adapters, config.partition)
        base, frozen = partition.split(params, chosen)
        quantize.check_frozen(base, frozen, config.quantize)
        frozen = quantize.cast(quantize.quantize(frozen, config.quantize), dtype)
    except ValueError as error:
        raise UserError(str(error)) from error
    trainable = trained_parts(base, adapters)
    optimizer = make_optimizer(config.optimizer, trainable, chosen, config.steps)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), trainable)
    rates = peak_rates(config.optimizer, trainable, chosen)
    table = partition.table(partition.combine(base, frozen), adapters, chosen, rates)
    trained_axes = {"params": subtree(axes, base), "adapters": adapter_axes(axes, *parts)}
    return Plan(
        sizes,
        optimizer,
        state,
        frozen,
        state_axes(state, trained_axes),
        quantize.axes(axes, frozen),
        chosen,
        table,
        devices,
    )


def trained_parts(base: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
    """Returns the trained leaves of the model and the adapters, as in training/step.py.

    Raises:
      UserError: there are neither.
    """
    trainable = {name: tree for name, tree in (("params", base), ("adapters", adapters)) if tree}
    if not trainable:
        raise UserError("partition freezes everything and there are no adapters: nothing would train")
    return trainable


def starting_adapters(config: TrainConfig, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the adapters before the first step, or of shapes their shapes: LoRA's, and the new vocabulary rows.

    Args:
      config: the settings.
      params: as the run holds them, quantised and cast: DoRA's magnitudes are the norms of the kernels in use.

    Raises:
      ValueError: a target that matches nothing, or more new rows than there are.
    """
    params = quantize.dequantize(params, jnp.float32)
    adapters = lora.init(params, tuple(config.lora.values()), jax.random.key(config.seed + 1))
    return adapters, new_rows.init(params, config.new_rows) if config.new_rows else {}


def adapter_axes(axes: dict[str, Any], lora_adapters: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """Returns the logical axes of both parts of `starting_adapters`, from those of the parameters."""
    return partition.combine(lora.axes(axes, lora_adapters), new_rows.axes(rows))


def subtree(tree: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of `tree` at the paths of `like`."""
    flat = paths.flatten(tree)
    return paths.unflatten({path: flat[path] for path in paths.flatten(like)})


def _size(tree: Any) -> str:
    """Returns what a tree of shapes takes, in words."""
    count = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return f"{count:,} bytes ({count / 2**30:.2f} GiB)"
