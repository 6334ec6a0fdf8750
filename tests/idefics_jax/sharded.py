"""Runs the tiny model on 8 devices that this process alone has, and prints what test_sharding.py asserts, as JSON.

A program of its own because the number of devices is settled once a process, and the other tests want one.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from idefics_jax import sharding
from idefics_jax.batch import BatchShape, fake_batch
from idefics_jax.param_transforms.paths import flatten
from tests.idefics_jax import tiny

MESHES = {
    "data": {"data": -1},
    "fsdp": {"data": 2, "fsdp": 4},
    "fsdp_tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
SHAPE = BatchShape(rows=8, tokens=40, vision_rows=2, patches=20, images=4, patch_dim=48)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    batch = fake_batch(SHAPE, vocab_size=64, image_token_id=62, num_latents=2, positions_per_side=8, seed=0)
    init = functools.partial(tiny.MODEL.init, method="full_logits")
    boxed = jax.eval_shape(init, jax.random.key(0), batch)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), sharding.unbox(boxed))
    alone = jax.jit(logits_and_grads)(params, batch)
    axes = sharding.logical_axes(boxed)
    json.dump({preset: compare(preset, params, axes, batch, alone) for preset in MESHES}, sys.stdout)


def logits_and_grads(params: dict, batch: dict) -> tuple[jax.Array, dict]:
    """The tiny model's logits, zero on padding, and the gradients of their mean square."""

    def loss(params):
        logits = tiny.MODEL.apply({"params": params}, batch, method="full_logits")
        logits = jnp.where(batch["segment_ids"][..., None] > 0, logits, 0)
        return jnp.mean(logits**2), logits

    grads, logits = jax.grad(loss, has_aux=True)(params)
    return logits, grads


def compare(preset: str, params: dict, axes: dict, batch: dict, alone: tuple[jax.Array, dict]) -> dict:
    """What becomes of the model under a preset; errors are in parts of the largest number of their array."""
    rules = sharding.RULES[preset]
    with sharding.use_mesh(sharding.make_mesh(MESHES[preset]), rules) as mesh:
        placed = jax.device_put(params, sharding.tree_shardings(mesh, axes, rules))
        rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        lowered = jax.jit(logits_and_grads).lower(placed, rows)
        logits, grads = lowered.compile()(placed, rows)
    kernel = placed["text_model"]["layers"]["mlp"]["gate_proj"]["kernel"]
    expected = flatten(alone[1])
    # The bias of the vision keys has a gradient of zero: softmax does not see it.
    floor = 1e-4 * max(np.abs(x).max() for x in expected.values())
    return {
        "devices": mesh.size,
        "kernel": kernel.shape,
        "kernel on a device": kernel.addressable_shards[0].data.shape,
        "logits on a device": logits.addressable_shards[0].data.shape,
        "constraints": lowered.as_text().count("sharding_constraint"),
        "error of logits": error(logits, alone[0], 0.0),
        "error of gradients": {path: error(x, expected[path], floor) for path, x in flatten(grads).items()},
    }


def error(found: jax.Array, expected: jax.Array, floor: float) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), floor))


if __name__ == "__main__":
    main()
