"""Generation compiled for a slice: what reading prompts and making a token take, and what they take at least.

The two programs are those that idefics_jax.generate runs, one after the other: `begin` reads the prompts, `advance`
makes a token of each row. Weights and arithmetic are bfloat16, each layer cut over all chips (fsdp_tensor).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from idefics_jax import sharding
from idefics_jax.batch import BatchShape, batch_spec
from idefics_jax.config import Idefics2Config
from idefics_jax.inference.generate import Decoding, advance, begin
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.param_transforms import paths
from idefics_jax.param_tree import param_shapes, param_shardings
from launch import calibration, estimate, kernels, program, slices
from launch.chips import CHIPS
from launch.estimate import gib
from launch.flops import Trained, Work, step_flops
from launch.program import Cost
from launch.report import print_table
from launch.workload import full_rows

# Ours. 4,900 patches are the released model's largest image.
PROMPT = {"tokens": 256, "vision_rows": 1, "patches": 4900, "images": 1}
NEW_TOKENS = 128
DECODING = Decoding(max_new_tokens=NEW_TOKENS, stop_ids=(2,), banned_ids=(), temperature=0.0, top_p=1.0, unroll=True)
RULES = sharding.RULES["fsdp_tensor"]


def prompts(config: Idefics2Config, rows: int) -> BatchShape:
    """Returns the shape of so many prompts."""
    return BatchShape(rows=rows, patch_dim=config.vision_config.patch_dim, **PROMPT)


def compiled(config: Idefics2Config, rows: int, mesh: Mesh) -> tuple[Cost, Cost]:
    """Compiles both programs for a mesh.

    Args:
      config: the model.
      rows: prompts at once.
      mesh: of a slice's devices.

    Returns:
      The cost of reading the prompts, and that of a token of each row.

    Raises:
      DoesNotFit: one of them takes more memory than a chip has.
    """
    model = Idefics2(config, dtype=jnp.bfloat16)
    where = param_shardings(config, mesh, RULES)
    params = jax.tree.map(lambda x, place: shape(x, place, jnp.bfloat16), param_shapes(config), where)
    everywhere = NamedSharding(mesh, PartitionSpec())
    with sharding.use_mesh(mesh, RULES):
        batch, rng = jax.tree.map(
            lambda x: shape(x, everywhere),
            (batch_spec(prompts(config, rows)), jax.eval_shape(lambda: jax.random.key(0))),
        )
        first = jax.jit(lambda variables, batch, rng: begin(model, variables, batch, DECODING, rng))
        lowered = first.lower({"params": params}, batch, rng)
        state = jax.tree.map(lambda x: shape(x, everywhere), lowered.out_info)
        # A device has the keys and values of its own heads.
        own = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
        layers = jax.tree.map(lambda x: shape(x, own), state["cache"]["layers"])
        # As the loop over tokens has them: layer by layer.
        state["cache"] = {**state["cache"], "layers": (layer(layers),) * config.text_config.num_hidden_layers}
        apart = {str(i): layer(params["text_model"]["layers"]) for i in range(config.text_config.num_hidden_layers)}
        params = {**params, "text_model": {**params["text_model"], "layers": apart}}
        model = model.clone(unroll=True)
        then = jax.jit(lambda variables, state, rng: advance(model, variables, state, DECODING, rng), donate_argnums=1)
        programs = lowered, then.lower({"params": params}, state, rng)
        return tuple(program.compiled_cost(one, {}) for one in programs)


def shape(leaf: Any, where: NamedSharding, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where)


def layer(stacked: Any) -> Any:
    """Returns one layer of a stack's shapes."""

    def of_one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=place)

    return jax.tree.map(of_one, stacked)


def seconds(cost: Cost, config: Idefics2Config, where: slices.Slice, least: float) -> float:
    """Returns what a program is estimated to take on a slice.

    At least the roofline: weights that are brought in beside computation have no cycles of their own.
    """
    blocks = kernels.Blocks.of(full_rows(prompts(config, 1)), config)
    own = sum(kernels.cycles(cost.kernels, blocks, config, where.generation).values())
    return max(least, (cost.cycles + own) / CHIPS[where.generation].clock + estimate.exposed_seconds(cost, where))


def least_seconds(config: Idefics2Config, rows: int, where: slices.Slice) -> tuple[float, float]:
    """Returns the roofline of reading the prompts, and that of a token of each row, in the middle of the answers."""
    flat = paths.flatten(param_shapes(config))
    text = config.text_config
    window = text.sliding_window
    seen = PROMPT["tokens"] + NEW_TOKENS // 2
    seen = seen if window is None else min(seen, window)
    prefill = sum(step_flops(config, full_rows(prompts(config, 1)).work(rows, window), Trained({}, {})).values())
    made = Work(tokens=rows, patches=0, images=0, text_pairs=rows * seen, vision_pairs=0)
    decode = sum(step_flops(config, made, Trained({}, {})).values())
    read = {path: 2.0 * leaf.size for path, leaf in flat.items() if path != "text_model/embed_tokens/embedding"}
    decoder = sum(size for path, size in read.items() if path.startswith("text_model/"))
    cache = 2.0 * 2 * rows * seen * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return (
        estimate.roofline_seconds(sum(read.values()), prefill, where),
        estimate.roofline_seconds(decoder + cache, decode, where),
    )


def report(config: Idefics2Config, slice_name: str, batches: list[int]) -> dict[str, float]:
    """Compiles generation of several batches, prints a line for each program, and returns the numbers.

    Raises:
      DoesNotFit: one of the programs takes more memory than a chip has.
    """
    where, numbers, table = slices.find(slice_name), {}, []
    mesh = sharding.make_mesh({"tensor": -1}, program.slice_devices(slice_name))
    for rows in batches:
        costs, least = compiled(config, rows, mesh), least_seconds(config, rows, where)
        phases = ("prefill", PROMPT["tokens"]), ("decode", 1)
        for (phase, tokens), cost, bound in zip(phases, costs, least, strict=True):
            took = seconds(cost, config, where, bound)
            bare = estimate.exposed_seconds(cost, where)
            row = [1e3 * took, 1e3 * bound, took / bound, tokens * rows / took, 1e3 * bare, gib(cost.peak_bytes)]
            table.append([f"{phase}, batch {rows}", *row])
            numbers |= {f"{phase}_{rows}_seconds": took, f"{phase}_{rows}_roofline_seconds": bound}
            numbers[f"{phase}_{rows}_peak_gib"] = gib(cost.peak_bytes)
    print_table(
        [slice_name, "ms", "roofline, ms", "times it", "tokens a second", "bare collectives, ms", "peak GiB a chip"],
        table,
    )
    print(calibration.sentence(where.generation))
    return numbers | {"fits": True, "calibration_error": calibration.error(where.generation)}
