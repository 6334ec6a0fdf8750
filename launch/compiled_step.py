"""A recipe's training step, compiled for a slice, and the estimate that follows."""

import dataclasses

import jax

from idefics_jax import sharding
from idefics_jax.batch import batch_spec
from idefics_jax.config import Idefics2Config
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.plan import Plan, plan
from idefics_jax.training.run import jitted, make_step
from launch import estimate, kernels, program, slices
from launch.chips import CHIPS
from launch.estimate import Estimate
from launch.flops import Trained, step_flops
from launch.program import Cost
from launch.traced import traced_flops
from launch.workload import Rows


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A recipe's step on a slice.

    Attributes:
      plan: what trains, in shapes.
      cost: of the compiled program on each device.
      traced: operations of its products over all devices, our kernels' left out.
    """

    plan: Plan
    cost: Cost
    traced: float


def compile_step(config: TrainConfig, slice_name: str, *, dump_to: str | None) -> Compiled:
    """Compiles the training step of a recipe; `dump_to` is a folder that the compiler writes its program to.

    Raises:
      DoesNotFit: it takes more memory than a chip has.
      UserError: the recipe cannot be used, or the slice is unknown.
    """
    traced, operations, planned = traced_step(config, slice_name)
    options = {"xla_dump_to": dump_to, "xla_dump_hlo_as_text": True} if dump_to else {}
    return Compiled(planned, program.compiled_cost(traced.lower(), options), operations)


def traced_step(config: TrainConfig, slice_name: str) -> tuple[jax.stages.Traced, float, Plan]:
    """Traces the training step of a recipe; returns it, the operations of its products, and what trains.

    Raises:
      UserError: the recipe cannot be used, or the slice is unknown.
    """
    mesh, rules = sharding.make_mesh(config.mesh, program.slice_devices(slice_name)), sharding.RULES[config.sharding]
    planned = plan(config)
    state, frozen = planned.placed(mesh, rules)
    rows = sharding.batch_sharding(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch_spec(config.data.shape))
    with sharding.use_mesh(mesh, rules):
        step = make_step(config, planned.sizes, planned.optimizer, mesh)
        places = jax.tree.map(lambda x: x.sharding, state)
        traced = jitted(step, places, mesh).trace(state, frozen, batch)
        return traced, traced_flops(traced.jaxpr), planned


def estimated(compiled: Compiled, config: TrainConfig, rows: Rows, where: slices.Slice) -> Estimate:
    """Returns what a step takes and how much of it is of use."""
    sizes, cost = compiled.plan.sizes, compiled.cost
    blocks = blocks_of(cost, sizes, rows)
    work = rows.work(config.data.shape.rows, sizes.text_config.sliding_window)
    chips = where.chips * where.count
    compute, own, bare = seconds_of(cost, sizes, rows, where)
    return Estimate(
        compute=compute,
        kernels=own,
        collectives=bare,
        needed=sum(step_flops(sizes, work, Trained.of(compiled.plan.state["trainable"])).values()),
        done=compiled.traced + chips * kernels.flops(cost.kernels, blocks, sizes),
        chips=chips,
        peak=CHIPS[where.generation].peak,
    )


def seconds_of(cost: Cost, sizes: Idefics2Config, rows: Rows, where: slices.Slice) -> tuple[float, float, float]:
    """Returns the seconds of the compiler's cycles, of our kernels, and of the collectives that nothing hides."""
    clock = CHIPS[where.generation].clock
    own = kernels.cycles(cost.kernels, blocks_of(cost, sizes, rows), sizes, where.generation)
    return cost.cycles / clock, sum(own.values()) / clock, estimate.exposed_seconds(cost, where)


def blocks_of(cost: Cost, sizes: Idefics2Config, rows: Rows) -> kernels.Blocks:
    """Counts the blocks of scores of a row, if the program has kernels that compute them."""
    return kernels.Blocks.of(rows, sizes) if cost.kernels else kernels.Blocks({})
