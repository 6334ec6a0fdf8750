"""What a run is made of: model, parameters in their two parts, optimizer, state and step, each placed on the mesh."""

import dataclasses
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
from idefics_jax.training.checkpoint import with_shardings
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.initial import initial_params, load_processor, model_config
from idefics_jax.training.optimizer import make_optimizer, peak_rates
from idefics_jax.training.step import init_state, make_train_step, state_axes

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
      model_config: sizes of the model.
      processor: tokenizer and image rules.
      mesh: where it runs.
      optimizer: the gradient transformation.
      table: every leaf with its shape, dtype, state, learning rate and decay, as text.
      layout: every leaf with its logical axes, where they lie on the mesh and what a device holds of it, as text.
      abstract_state, abstract_frozen: shapes and shardings, for a restore.
      step: jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated.
    """

    config: TrainConfig
    model_config: Idefics2Config
    processor: Processor
    mesh: Mesh
    optimizer: optax.GradientTransformation
    table: str
    layout: str
    abstract_state: dict[str, Any]
    abstract_frozen: dict[str, Any]
    step: Callable

    def new_state(self, trainable: dict[str, Any]) -> dict[str, Any]:
        """Returns the state before the first step, placed on the mesh; `trainable` is donated to it."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        start = jax.jit(lambda tree: init_state(tree, self.optimizer), out_shardings=shardings, donate_argnums=0)
        return start(trainable)

    def place(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on the mesh."""
        spread = sharding.batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(spread, array) for name, array in batch.items()}

    def final_params(self, trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the trained model: both parts joined, adapters merged in float32.

        What they are merged into stays float32, whatever the dtype of the base: a shorter one would round away most of
        what little they add.
        """
        params = partition.combine(trainable.get("params", {}), frozen)
        params = quantize.dequantize(params, jnp.dtype(self.config.frozen_dtype))
        adapters = trainable.get("adapters", {})
        merged = {f"{module}/kernel" for module in lora.adapted_modules(adapters)} | set(new_rows.tables(adapters))
        params = paths.map_paths(lambda path, leaf: leaf.astype(jnp.float32) if path in merged else leaf, params)
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


def assemble(config: TrainConfig, mesh: Mesh) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    """Builds everything a run needs, inside `sharding.use_mesh`.

    Returns:
      The run, and the two parts of the parameters it starts from: trainable (as in training/step.py) and frozen.

    Raises:
      UserError: the parts of the config do not fit each other.
    """
    processor = load_processor(config)
    sizes, rules = model_config(config, processor), sharding.RULES[config.sharding]
    shapes, axes = abstract_params(sizes)
    model = make_model(config, sizes)
    try:
        params = initial_params(config, sizes, mesh)
        planned = partition.combine(*jax.eval_shape(lambda tree: starting_adapters(config, tree), params))
        chosen = partition.choose(params, planned, config.partition)
        base, frozen = partition.split(params, chosen)
        quantize.check_frozen(base, frozen, config.quantize)
        frozen = quantize.cast(quantize.quantize(frozen, config.quantize), jnp.dtype(config.frozen_dtype))
        adapters, names = make_adapters(config, partition.combine(base, frozen), axes, mesh)
        trainable = trained_parts(base, adapters)
        if adapters:
            lora.assert_used(lambda tree: _traced_logits(model, shapes, tree), adapters)
    except ValueError as error:
        raise UserError(str(error)) from error
    optimizer = make_optimizer(config.optimizer, trainable, chosen, config.steps)
    rates = peak_rates(config.optimizer, trainable, chosen)
    state_shapes = jax.eval_shape(lambda tree: init_state(tree, optimizer), trainable)
    masters = state_shapes["trainable"].get("params", {})
    trainable_axes = {"params": subtree(axes, base), "adapters": names}
    state_places = sharding.tree_shardings(mesh, state_axes(state_shapes, trainable_axes), rules)
    frozen_places = sharding.tree_shardings(mesh, quantize.axes(axes, frozen), rules)
    step = make_step(config, sizes, optimizer, mesh)
    leaves = ((masters, trainable_axes["params"]), (frozen, quantize.axes(axes, frozen)), (adapters, names))
    flat_shapes, flat_axes = (
        {path: leaf for pair in leaves for path, leaf in paths.flatten(pair[i]).items()} for i in range(2)
    )
    run = Run(
        config=config,
        model_config=sizes,
        processor=processor,
        mesh=mesh,
        optimizer=optimizer,
        table=partition.table(partition.combine(masters, frozen), adapters, chosen, rates),
        layout=sharding.table(mesh, flat_shapes, flat_axes, rules),
        abstract_state=with_shardings(state_shapes, state_places),
        abstract_frozen=with_shardings(frozen, frozen_places),
        step=jitted(step, state_places, mesh),
    )
    return run, trainable, frozen


def trained_parts(base: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
    """Returns the trained leaves of the model and the adapters, as in training/step.py.

    Raises:
      UserError: there are neither.
    """
    trainable = {name: tree for name, tree in (("params", base), ("adapters", adapters)) if tree}
    if not trainable:
        raise UserError("partition freezes everything and there are no adapters: nothing would train")
    return trainable


def make_adapters(
    config: TrainConfig, params: dict[str, Any], axes: dict[str, Any], mesh: Mesh
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the run's adapters as they start, on the mesh, and their logical axes.

    Raises:
      ValueError: a target that matches nothing, or more new rows than there are.
    """
    lora_shapes, row_shapes = jax.eval_shape(lambda tree: starting_adapters(config, tree), params)
    names = adapter_axes(axes, lora_shapes, row_shapes)
    places = sharding.tree_shardings(mesh, names, sharding.RULES[config.sharding])
    start = jax.jit(lambda tree: partition.combine(*starting_adapters(config, tree)), out_shardings=places)
    return start(params), names


def adapter_axes(axes: dict[str, Any], lora_adapters: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """Returns the logical axes of both parts of `starting_adapters`, from those of the parameters."""
    return partition.combine(lora.axes(axes, lora_adapters), new_rows.axes(rows))


def starting_adapters(config: TrainConfig, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the adapters before the first step: LoRA's, and the new vocabulary rows; to be traced.

    Args:
      config: the settings.
      params: as the run holds them, quantised and cast: DoRA's magnitudes are the norms of the kernels in use.

    Raises:
      ValueError: a target that matches nothing, or more new rows than there are.
    """
    params = quantize.dequantize(params, jnp.float32)
    adapters = lora.init(params, tuple(config.lora.values()), jax.random.key(config.seed + 1))
    return adapters, new_rows.init(params, config.new_rows) if config.new_rows else {}


def _traced_logits(model: Idefics2, shapes: dict[str, Any], adapters: dict[str, Any]) -> jax.Array:
    """The model's logits as a function of the adapters alone, to be traced, never run."""
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return model.apply({"params": params, "adapters": adapters}, probe_batch(model.config), method=Idefics2.full_logits)


def subtree(tree: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of `tree` at the paths of `like`."""
    flat = paths.flatten(tree)
    return paths.unflatten({path: flat[path] for path in paths.flatten(like)})
