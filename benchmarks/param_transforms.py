"""What adapting costs, full, by LoRA or by DoRA: operations, a TPU's estimated cycles, memory.

    python -m benchmarks.param_transforms [--json FILE]

Nothing is run: programs are compiled, for this CPU to count operations, and for a v5p-8 slice (libtpu) to ask its
compiler for cycles and memory. Sizes are those of the released 8B model, adapters those of configs/idefics2_8b.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from configs.idefics2_8b import instruct
from idefics_jax import commands, sharding
from idefics_jax.attention import Visibility
from idefics_jax.config import Idefics2Config, TextConfig
from idefics_jax.errors import UserError
from idefics_jax.flash_attention import active_blocks
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.models.mistral import Layer
from idefics_jax.param_transforms import lora, new_rows, partition, paths
from idefics_jax.param_tree import abstract_params
from idefics_jax.training.losses import next_token_loss
from idefics_jax.training.optimizer import OptimizerConfig, make_optimizer
from idefics_jax.training.step import init_state, make_train_step, state_axes
from launch import kernels, report
from launch import program as compiler

# Each step is compiled with those that fit the slice, and the fastest counts: what "none" keeps of a LoRA step takes
# longer to write and read than to compute again.
POLICIES = ("none", "linear")
SLICE = "v5p-8"
RULES = sharding.RULES["fsdp"]
# The released model's.
SECTIONS = instruct.get_config().model.to_dict()
MODEL = Idefics2Config.from_hf({"image_token_id": 32001, "model_type": "idefics2", **SECTIONS})
RANK, ALPHA, DROPOUT, NEW_ROWS = 64, 16.0, 0.1, 3  # the authors' SmolVLM runs
VARIANTS = ("full", "lora", "lora, dropout", "dora")
# Operations: rows of one query block, so that no loop hides any. Cycles: tokens a chip as in the facts published.
FLOP_ROWS, FLOP_TOKENS = 4, 512
ROWS_A_CHIP, TOKENS, CHUNK = 4, 2048, 512
OPTIMIZER = OptimizerConfig(
    name="adamw",
    learning_rate=1e-4,
    muon_learning_rate=1e-4,
    schedule="constant",
    warmup_steps=0,
    b1=0.9,
    b2=0.999,
    clip_norm=1.0,
)
FULL = (partition.Rule(".*", "trainable", 1.0, 0.1),)
ADAPTED = (partition.Rule(".*/(lora_.*|new_rows)", "trainable", 1.0, 0.0), partition.Rule(".*", "frozen"))


def spec(variant: str, pattern: str) -> tuple[lora.LoraTarget, ...]:
    if variant == "full":
        return ()
    dropout = DROPOUT if variant == "lora, dropout" else 0.0
    return (lora.LoraTarget(pattern, RANK, ALPHA, dropout, dora=variant == "dora"),)


def block_gradients(variant: str, config: TextConfig) -> tuple[Callable, tuple[Any, ...]]:
    """Returns a function to the gradients of a decoder layer's trained leaves and of its input, and its arguments."""
    layer, shape = Layer(config, jnp.float32), (FLOP_ROWS, FLOP_TOKENS)
    positions = jnp.tile(jnp.arange(FLOP_TOKENS), (FLOP_ROWS, 1))
    segments = jnp.ones(shape, jnp.int32)
    shared = (positions, Visibility(segments, segments, positions, positions, config.sliding_window), None)
    x = jax.ShapeDtypeStruct((*shape, config.hidden_size), jnp.float32)
    params = jax.eval_shape(lambda y: sharding.unbox(layer.init(jax.random.key(0), y, shared, None)["params"]), x)
    targets = spec(variant, ".*")
    adapters = jax.eval_shape(lambda tree: lora.init(tree, targets, jax.random.key(0)), params)

    def loss(trained, x, frozen, weight):
        collections = {"params": {**frozen, **trained} if variant == "full" else frozen}
        if variant != "full":
            collections["adapters"] = lora.with_dropout(lora.scale(trained, targets), targets)
        y, _ = layer.apply(collections, x, shared, None, rngs={"dropout": jax.random.key(0)})
        # Squared, so that the layer's own output is needed too and no product is dropped as dead.
        return jnp.sum(jnp.square(y) * weight)

    trained, frozen = (params, {}) if variant == "full" else (adapters, params)
    return jax.grad(loss, argnums=(0, 1)), (trained, x, frozen, x)


def flops(variant: str) -> float:
    """Returns the floating-point operations of a decoder layer's forward and backward pass."""
    gradients, arguments = block_gradients(variant, MODEL.text_config)
    return jax.jit(gradients).lower(*arguments).compile().cost_analysis()["flops"]


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step and its arguments as shapes on a slice."""

    step: Callable
    state: Any
    frozen: Any
    batch: Any


def on_mesh(mesh: Any, shapes: Any, axes: Any, dtype: Any = None) -> Any:
    """Returns shapes with the places their axes give them, in another dtype if one is named."""
    places = sharding.tree_shardings(mesh, axes, RULES)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), shapes, places)


def program(variant: str, part: str, remat: str, mesh: Any) -> Program:
    """Returns the step that trains one part of the model (a pattern of paths), all of it or by adapters."""
    shapes, axes = (
        paths.unflatten({path: leaf for path, leaf in paths.flatten(tree).items() if path.startswith(part)})
        for tree in abstract_params(MODEL)
    )
    targets = spec(variant, r"vision_model/encoder/.*" if part == "vision_model" else r"text_model/(layers/.*|lm_head)")
    if not part and targets:
        targets += (dataclasses.replace(targets[0], pattern=r"vision_model/encoder/.*"),)

    def adapt(tree):
        return partition.combine(lora.init(tree, targets, jax.random.key(0)), new_rows.init(tree, NEW_ROWS))

    adapters = {} if variant == "full" else jax.eval_shape(adapt, shapes)
    rows = {path: leaf for path, leaf in paths.flatten(adapters).items() if path.endswith(new_rows.NAME)}
    others = {path: leaf for path, leaf in paths.flatten(adapters).items() if path not in rows}
    adapter_axes = partition.combine(lora.axes(axes, paths.unflatten(others)), new_rows.axes(paths.unflatten(rows)))
    chosen = partition.choose(shapes, adapters, FULL if variant == "full" else ADAPTED)
    base, frozen = partition.split(shapes, chosen)
    trainable = {name: tree for name, tree in (("params", base), ("adapters", adapters)) if tree}
    optimizer = make_optimizer(OPTIMIZER, trainable, chosen, steps=1000)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), trainable)
    trainable_axes = {"params": axes if base else {}, "adapters": adapter_axes}
    frozen_axes = partition.split(axes, chosen)[1] if frozen else {}
    batch = {
        name: jax.ShapeDtypeStruct((ROWS_A_CHIP * mesh.size, TOKENS), kind, sharding=sharding.batch_sharding(mesh))
        for name, kind in (
            ("tokens", jnp.int32),
            ("segment_ids", jnp.int32),
            ("positions", jnp.int32),
            ("loss_weights", jnp.float32),
        )
    }
    model = Idefics2(MODEL, dtype=jnp.bfloat16, remat=remat)
    step = make_train_step(model, optimizer, targets, accumulation=1, chunk=CHUNK, seed=0, max_skipped=0)
    return Program(
        step,
        on_mesh(mesh, state, state_axes(state, trainable_axes)),
        on_mesh(mesh, frozen, frozen_axes, jnp.bfloat16),
        batch,
    )


def fastest(variant: str, mesh: Any) -> tuple[str, compiler.Cost]:
    """Returns the remat policy with the fewest cycles of those that fit, and the cost of the decoder's step with it."""
    found = {}
    for policy in POLICIES:
        it = program(variant, "text_model", policy, mesh)
        try:
            found[policy] = compiler.cost(it.step, it.state, it.frozen, it.batch, donate=(0,))
        except compiler.DoesNotFit as error:
            print(f"{variant} with remat {policy!r}: {error}", flush=True)
            continue
        print(
            f"{variant} with remat {policy!r}: {found[policy].cycles / 1e6:,.0f} Mcycles beside attention", flush=True
        )
    if not found:
        raise UserError(f"the {variant} step fits {SLICE} with no policy of {', '.join(POLICIES)}")
    return min(found.items(), key=lambda item: item[1].cycles)


def step_cycles(cost: compiler.Cost) -> float:
    """Returns the cycles of a step: the compiler's, and those of the attention kernel over rows of one document."""
    row = jnp.ones((1, TOKENS), jnp.int32), jnp.arange(TOKENS)[None]
    seen = Visibility(row[0], row[0], row[1], row[1], MODEL.text_config.sliding_window)
    blocks = kernels.Blocks({"text_model": float(active_blocks(seen).sum())})
    generation = SLICE.split("-")[0]
    return cost.cycles + sum(kernels.cycles(cost.kernels, blocks, MODEL, generation).values())


def arithmetic_bytes(tree: Any) -> int:
    """Returns the bytes of one device's part of a tree, by its shapes and shardings alone."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def held(tree: Any) -> int:
    """Returns the bytes that a tree takes on each device of the slice, as its compiler lays it out."""
    leaves = jax.tree.leaves(tree)
    return compiler.cost(
        lambda *arrays: [x + 1 for x in arrays], *leaves, donate=tuple(range(len(leaves)))
    ).argument_bytes


def loss_peaks(mesh: Any) -> tuple[int, int]:
    """Returns peak bytes of the loss and its gradient with all logits at once, and a chunk at a time."""
    text, rows = MODEL.text_config, ROWS_A_CHIP * mesh.size
    spread, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    hidden = jax.ShapeDtypeStruct((rows, TOKENS, text.hidden_size), jnp.bfloat16, sharding=spread)
    tokens = jax.ShapeDtypeStruct((rows, TOKENS), jnp.int32, sharding=spread)
    weights = jax.ShapeDtypeStruct((rows, TOKENS), jnp.float32, sharding=spread)
    head = jax.ShapeDtypeStruct((text.hidden_size, text.vocab_size), jnp.bfloat16, sharding=whole)

    def loss(hidden, head, tokens, weights, chunk):
        def logits(head, x, *_):
            return jnp.matmul(x, head, preferred_element_type=jnp.float32)

        return next_token_loss(hidden, tokens, weights, head, logits, chunk=chunk)["loss"]

    def peak(chunk):
        gradient = jax.grad(functools.partial(loss, chunk=chunk), argnums=(0, 1))
        return compiler.cost(gradient, hidden, head, tokens, weights).peak_bytes

    return peak(TOKENS), peak(CHUNK)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for a TPU
    counted = {variant: flops(variant) for variant in VARIANTS}
    mesh = sharding.make_mesh({"fsdp": -1}, compiler.slice_devices(SLICE))
    numbers, table = {}, []
    with sharding.use_mesh(mesh, RULES):
        costs = {}
        for variant in VARIANTS:
            costs[variant] = fastest(variant, mesh)
        lora_8b = program("lora", "", "full", mesh)
        sizes = {
            "adapters, masters and moments": lora_8b.state,
            "frozen base": lora_8b.frozen,
        }
        memory = {name: (arithmetic_bytes(tree), held(tree)) for name, tree in sizes.items()}
        plain, chunked = loss_peaks(mesh)
    cycles = {variant: step_cycles(it) for variant, (_, it) in costs.items()}
    full = cycles["full"]
    for variant, (policy, it) in costs.items():
        table.append(
            [
                variant,
                counted[variant] / 1e9,
                policy,
                cycles[variant] / 1e6,
                it.peak_bytes / 2**30,
                cycles[variant] / full,
            ]
        )
    print(
        f"\n{FLOP_ROWS} x {FLOP_TOKENS} tokens through one layer; {ROWS_A_CHIP} x {TOKENS} a chip through the decoder"
    )
    report.print_table(["", "GFLOP a layer", "remat", f"{SLICE} Mcycles", "peak GiB", "of full"], table)
    rows = [[name, by_hand / 2**30, compiled / 2**30] for name, (by_hand, compiled) in memory.items()]
    rows.append(["loss, all logits at once", "", plain / 2**30])
    rows.append([f"loss, {CHUNK} at a time", "", chunked / 2**30])
    print(f"\nGiB a chip of {SLICE}, the 8B model")
    report.print_table(["", "arithmetic", "compiler"], rows)
    numbers["flops_lora_over_full"] = counted["lora"] / counted["full"]
    numbers["flops_dora_over_lora"] = counted["dora"] / counted["lora"]
    numbers["v5p_cycles_dropout_over_lora"] = cycles["lora, dropout"] / cycles["lora"]
    numbers["v5p_cycles_lora_over_full"] = cycles["lora"] / full
    numbers["v5p_cycles_dora_over_lora"] = cycles["dora"] / cycles["lora"]
    numbers["loss_peak_chunked_over_plain"] = chunked / plain
    for name, (by_hand, compiled) in memory.items():
        numbers[f"{name.split()[0].strip(',')}_gib_compiler_over_arithmetic"] = compiled / by_hand
    report.write_json(numbers)


if __name__ == "__main__":
    commands.run(main)
