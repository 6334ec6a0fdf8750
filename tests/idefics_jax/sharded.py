"""Trains the tiny model on 8 devices and on one, and prints what test_sharding.py asserts, as JSON.

A program of its own because the number of devices is settled once a process, and the other tests want one.
"""

import gc
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from idefics_jax import sharding
from idefics_jax.batch import BatchShape, fake_batch
from idefics_jax.param_transforms import lora, partition, paths
from idefics_jax.param_tree import abstract_params
from idefics_jax.training.step import init_state, make_train_step, state_axes
from launch.program import Text
from tests.idefics_jax import tiny

# Name -> preset of sharding.RULES and sizes of the mesh.
MESHES = {
    "data": ("data", {"data": -1}),
    "fsdp": ("fsdp", {"data": 2, "fsdp": 4}),
    "fsdp_tensor": ("fsdp_tensor", {"data": 2, "fsdp": 2, "tensor": 2}),
    "slices": ("fsdp", {"slice": 2, "fsdp": 4}),
}
ADAPTERS = "(vision_model/encoder|text_model)/layers/.*_proj"
ADAPTATIONS = ("frozen", "lora", "dora", "full")
SHAPE = BatchShape(rows=8, tokens=40, vision_rows=2, patches=20, images=4, patch_dim=48)
CHUNK, STEPS = 16, 3


def main() -> None:
    gc.set_threshold(100_000, 20, 100)  # as in conftest.py
    jax.config.update("jax_num_cpu_devices", 8)
    batch = fake_batch(SHAPE, vocab_size=64, image_token_id=62, num_latents=2, positions_per_side=8, seed=0)
    # All of one magnitude, so that every weight matters; rows and documents of unequal length stay.
    rng = np.random.default_rng(0)
    shapes, _ = abstract_params(tiny.CONFIG)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes)
    found = {}
    for adaptation in ADAPTATIONS:
        trainable, frozen, spec = parts(params, adaptation)
        alone = train(trainable, frozen, spec, batch, "data", {"data": 1}, jax.devices()[:1])
        for name, (preset, sizes) in MESHES.items():
            spread = train(trainable, frozen, spec, batch, preset, sizes, jax.devices())
            found[f"{name} {adaptation}"] = compare(spread, alone, preset)
    json.dump(found, sys.stdout)


def parts(params: dict, adaptation: str) -> tuple[dict, dict, lora.LoraSpec]:
    """Returns what trains, what does not, and the adapters' spec: the connector alone, with adapters, or everything."""
    dora = adaptation == "dora"
    spec = (lora.LoraTarget(ADAPTERS, 2, 4.0, 0.0 if dora else 0.1, dora),) * (adaptation in ("lora", "dora"))
    adapters = lora.init(params, spec, jax.random.key(1)) if spec else {}
    # B starts at zero; moved, so that A has a gradient too.
    adapters = jax.tree.map(lambda x: np.asarray(x + 0.1), adapters)
    trained = ".*" if adaptation == "full" else ".*/lora_.*|connector/.*"
    rules = [partition.Rule(trained, "trainable"), *[partition.Rule(".*", "frozen")] * (adaptation != "full")]
    base, frozen = partition.split(params, partition.choose(params, adapters, rules))
    return {"params": base} | ({"adapters": adapters} if adapters else {}), frozen, spec


def train(trainable: dict, frozen: dict, spec: lora.LoraSpec, batch: dict, preset: str, sizes: dict, devices: list):
    """Returns the loss, gradients and parameters of three steps under a preset, and the compiled step."""
    # Momentum, not Adam, which would turn the rounding of gradients that are zero into steps, and takes a fifth longer
    # to compile.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9))
    step = make_train_step(tiny.MODEL, optimizer, spec, accumulation=1, chunk=CHUNK, seed=0, max_skipped=0)
    rules, (_, axes) = sharding.RULES[preset], abstract_params(tiny.CONFIG)
    flat = paths.flatten(axes)
    trained_axes = {
        "params": paths.unflatten({path: flat[path] for path in paths.flatten(trainable["params"])}),
        "adapters": lora.axes(axes, trainable.get("adapters", {})),
    }
    frozen_axes = paths.unflatten({path: flat[path] for path in paths.flatten(frozen)})
    with sharding.use_mesh(sharding.make_mesh(sizes, devices), rules) as mesh:
        state = init_state(jax.tree.map(jnp.asarray, trainable), optimizer)
        places = sharding.tree_shardings(mesh, state_axes(state, trained_axes), rules)
        state = jax.device_put(state, places)
        frozen = jax.device_put(frozen, sharding.tree_shardings(mesh, frozen_axes, rules))
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(places, None)).lower(state, frozen, batch)
        compiled = lowered.compile()
        losses, gradients = [], None
        for _ in range(STEPS):
            state, metrics = compiled(state, frozen, batch)
            losses.append(float(metrics["loss"]))
            if gradients is None:  # the momentum after the first step: the gradient, clipped as a whole
                gradients = jax.tree.map(np.asarray, optax.tree.get(state["opt_state"], "trace"))
    return losses, gradients, state["trainable"], compiled, lowered


def compare(spread: Any, alone: Any, preset: str) -> dict[str, Any]:
    """Returns errors in parts of the largest number of their array, and what passes between devices."""
    losses, gradients, trained, compiled, lowered = spread
    expected = {path: np.asarray(x) for path, x in paths.flatten(alone[1]).items()}
    # The bias of the vision keys has a gradient of zero: softmax does not see it.
    floor = 1e-4 * max(np.abs(x).max() for x in expected.values())
    of_state = {path: np.asarray(x) for path, x in paths.flatten(alone[2]).items()}
    kernel = trained["params"].get("text_model", {}).get("layers", {}).get("mlp", {}).get("gate_proj", {}).get("kernel")
    return {
        "error of loss": max(abs(a - b) / abs(b) for a, b in zip(losses, alone[0], strict=True)),
        "error of gradients": {path: error(x, expected[path], floor) for path, x in paths.flatten(gradients).items()},
        "error of parameters": {path: error(x, of_state[path], 1e-2) for path, x in paths.flatten(trained).items()},
        "kernel on a device": None if kernel is None else kernel.addressable_shards[0].data.shape,
        "constraints": lowered.as_text().count("sharding_constraint"),
        "collectives": [[one.kind, one.shape] for one in Text(compiled.as_text()).collectives()],
    }


def error(found: Any, expected: Any, floor: float) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / max(np.abs(expected).max(), floor))


if __name__ == "__main__":
    main()
