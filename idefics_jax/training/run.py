"""What a run is made of: model, parameters in their two parts, optimizer, state and step, each placed on the mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from idefics_jax import sharding
from idefics_jax.config import Idefics2Config
from idefics_jax.errors import UserError
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.param_transforms import lora, new_rows, partition, paths, quantize
from idefics_jax.param_tree import abstract_params, probe_batch
from idefics_jax.processor import Processor
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.initial import initial_params, load_processor, model_config
from idefics_jax.training.plan import Plan, lay_out, starting_adapters
from idefics_jax.training.step import init_state, make_train_step

# Flags of the TPU's compiler. Without the first, a product cut over devices becomes a loop of permutations around the
# ring of each axis. With the others parameters are gathered while something else is computed, as on v5e by default.
TPU_OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that stay as they are, ready for the loop.

    Attributes:
      config: the settings.
      processor: tokenizer and image rules.
      mesh: where it runs.
      plan: sizes of the model, optimizer, and what trains.
      layout: every leaf with its logical axes, where they lie on the mesh and what a device holds of it, as text.
      abstract_state, abstract_frozen: shapes and shardings, for a restore.
      step: jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated.
    """

    config: TrainConfig
    processor: Processor
    mesh: Mesh
    plan: Plan
    layout: str
    abstract_state: dict[str, Any]
    abstract_frozen: dict[str, Any]
    step: Callable

    def first_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Makes or reads the weights to start from; returns the state before the first step and what is frozen.

        Raises:
          UserError: a folder of weights is damaged, or they do not fit the sizes.
        """
        config, shardings = self.config, jax.tree.map(lambda x: x.sharding, self.abstract_state)
        # Nothing else refers to the weights, so that what is quantised makes room.
        base, frozen = partition.split(initial_params(config, self.plan.sizes, self.mesh), self.plan.chosen)
        frozen = quantize.cast(quantize.quantize(frozen, config.quantize), jnp.dtype(config.frozen_dtype))
        trainable = {"params": base} if base else {}
        if "adapters" in shardings["trainable"]:
            make = jax.jit(
                lambda tree: partition.combine(*starting_adapters(config, tree)),
                out_shardings=shardings["trainable"]["adapters"],
            )
            trainable["adapters"] = make(partition.combine(base, frozen))
        begin = jax.jit(lambda tree: init_state(tree, self.plan.optimizer), out_shardings=shardings, donate_argnums=0)
        return begin(trainable), frozen

    def place(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on the mesh."""
        spread = sharding.batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(spread, array) for name, array in batch.items()}

    def final_params(self, trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the trained model: both parts joined, adapters merged in float32.

        What they are merged into stays float32, whatever the dtype of the base: a shorter one would round away most of
        what little they add.
        """
        adapters = trainable.get("adapters", {})
        merged = {f"{module}/kernel" for module in lora.adapted_modules(adapters)} | set(new_rows.tables(adapters))
        # int8 kernels, too, are multiplied out in float32 and shortened only where nothing is added to them.
        held = paths.flatten(partition.combine(trainable.get("params", {}), frozen))
        short = {f"{paths.parent(path)}/kernel" for path in held if path.endswith("/kernel_scale")} - merged
        params = quantize.dequantize(paths.unflatten(held), jnp.float32)
        dtypes = dict.fromkeys(short, jnp.dtype(self.config.frozen_dtype)) | dict.fromkeys(merged, jnp.float32)
        params = paths.map_paths(lambda path, leaf: leaf.astype(dtypes.get(path, leaf.dtype)), params)
        return new_rows.merge(lora.merge(params, adapters, tuple(self.config.lora.values())), adapters)


@dataclasses.dataclass(frozen=True)
class RowShare:
    """Which rows of every batch this process reads.

    Attributes:
      index, count: its part and the number of parts, for pipeline.batches.
      leads: whether no earlier process reads the same rows, as several do where a mesh cuts the parameters alone
        between them.
    """

    index: int
    count: int
    leads: bool


def row_share(mesh: Mesh, rows: int) -> RowShare:
    """Returns what this process reads of batches of so many rows, laid out by sharding.batch_sharding.

    Raises:
      UserError: the rows cannot be spread evenly, or two processes would share some of their rows and not others.
    """
    device_rows(mesh, rows)
    spread = sharding.batch_sharding(mesh)
    starts: dict[int, set[int]] = {}
    for device, (part,) in spread.devices_indices_map((rows,)).items():
        starts.setdefault(device.process_index, set()).add(part.start or 0)
    parts = sorted({tuple(sorted(own)) for own in starts.values()})
    if len({start for part in parts for start in part}) != sum(map(len, parts)) or len(set(map(len, parts))) > 1:
        raise UserError(
            f"mesh {dict(mesh.shape)} gives the {len(starts)} processes overlapping rows of the batch; choose sizes of "
            "which the devices of a process are a multiple or a divisor"
        )
    here = tuple(sorted(starts[jax.process_index()]))
    alike = [process for process, own in starts.items() if tuple(sorted(own)) == here]
    return RowShare(parts.index(here), len(parts), leads=jax.process_index() == min(alike))


def device_rows(mesh: Mesh | AbstractMesh, rows: int) -> int:
    """Returns how many of a batch's rows each device of a mesh has.

    Raises:
      UserError: the rows cannot be spread evenly.
    """
    ways = math.prod(mesh.shape[axis] for axis in sharding.batch_sharding(mesh).spec[0])
    if rows % ways:
        raise UserError(f"data.shape.rows is {rows}; the mesh spreads them over {ways} devices, so give a multiple")
    return rows // ways


def micro_batches(rows: int, most: int) -> int:
    """Returns the fewest equal parts of a device's rows that have at most `most`."""
    return next(count for count in range(1, rows + 1) if rows % count == 0 and rows // count <= most)


def make_model(config: TrainConfig, sizes: Idefics2Config) -> Idefics2:
    """Returns the module that a run trains."""
    return Idefics2(
        sizes,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        vision_remat=config.vision_remat,
        neftune_alpha=config.neftune_alpha,
    )


def make_step(
    config: TrainConfig, sizes: Idefics2Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable:
    """Returns the step of a run on a mesh, as `make_train_step` does.

    Raises:
      UserError: the rows of a batch cannot be spread evenly over the mesh.
    """
    return make_train_step(
        make_model(config, sizes),
        optimizer,
        tuple(config.lora.values()),
        accumulation=micro_batches(device_rows(mesh, config.data.shape.rows), config.rows_a_device),
        chunk=config.loss_chunk,
        seed=config.seed,
        max_skipped=config.max_skipped_steps,
    )


def jitted(step: Callable, places: Any, mesh: Mesh) -> Callable:
    """Returns a step as it is compiled for a mesh: the state, whose shardings are `places`, gives up its memory."""
    options = TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None), compiler_options=options)


def assemble(config: TrainConfig, mesh: Mesh) -> Run:
    """Builds everything a run needs, inside `sharding.use_mesh`, from shapes: no weight is made or read.

    Raises:
      UserError: the parts of the config do not fit each other.
    """
    processor = load_processor(config)
    sizes, rules = model_config(config, processor), sharding.RULES[config.sharding]
    plan = lay_out(config, sizes)
    trained, axes = plan.state["trainable"], plan.state_axes["trainable"]
    if "adapters" in trained:
        try:
            lora.assert_used(functools.partial(_traced_logits, make_model(config, sizes)), trained["adapters"])
        except ValueError as error:
            raise UserError(str(error)) from error
    leaves = [(trained[name], axes[name]) for name in trained] + [(plan.frozen, plan.frozen_axes)]
    flat_shapes, flat_axes = (
        {path: leaf for pair in leaves for path, leaf in paths.flatten(pair[i]).items()} for i in range(2)
    )
    state, frozen = plan.placed(mesh, rules)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return Run(
        config=config,
        processor=processor,
        mesh=mesh,
        plan=plan,
        layout=sharding.table(mesh, flat_shapes, flat_axes, rules),
        abstract_state=state,
        abstract_frozen=frozen,
        step=jitted(make_step(config, sizes, plan.optimizer, mesh), places, mesh),
    )


def _traced_logits(model: Idefics2, adapters: dict[str, Any]) -> jax.Array:
    """The model's logits as a function of the adapters alone, to be traced, never run."""
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(model.config)[0])
    return model.apply({"params": params, "adapters": adapters}, probe_batch(model.config), method=Idefics2.full_logits)
