"""Runs what is under shard_map on 8 devices beside its twin on one, and prints what its test asserts, as JSON.

A program of its own because the number of devices is settled once a process, and the other tests want one.
"""

import functools
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from idefics_jax import flash_attention, sharding
from idefics_jax.attention import attend, of_own_rows
from idefics_jax.errors import UserError
from idefics_jax.inference.generate import Decoding, generate
from idefics_jax.model import check_cut, cut_over
from idefics_jax.param_tree import param_shardings
from idefics_jax.training.losses import next_token_loss
from idefics_jax.visibility import Visibility
from tests.idefics_jax import tiny

RULES = sharding.RULES["fsdp_tensor"]
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
ROWS, TOKENS, WIDTH, VOCABULARY = 4, 24, 8, 37
HEADS = ("heads", "kv_heads")


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    flash_attention.BLOCK = 128
    json.dump({"attention": attention(), "loss": loss(), "generation": generation()}, sys.stdout)


def attention() -> dict[str, Any]:
    """Four query heads and two key heads over packed rows."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, (ROWS, 150)), axis=1).astype(np.int32)
    inputs = [rng.normal(size=(ROWS, 150, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]

    def sharded(*x):
        return of_own_rows(functools.partial(flash_attention.flash_attention, interpret=True), *x, HEADS)

    def gradients(fn, *x):
        return jax.grad(lambda *x: jnp.sum(fn(*x[:3], Visibility(x[3], x[3])) ** 2), (0, 1, 2))(*x)

    return compare(
        functools.partial(gradients, sharded),
        functools.partial(gradients, attend),
        (*inputs, segments),
        (*(("act_batch", None, name, None) for name in ("heads", "kv_heads", "kv_heads")), ("act_batch", None)),
    )


def loss() -> dict[str, Any]:
    """Three chunks, and a vocabulary that no number of devices divides."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(ROWS, TOKENS, WIDTH)), rng.normal(size=(WIDTH, VOCABULARY))
    tokens, weights = rng.integers(0, VOCABULARY, (ROWS, TOKENS)), rng.uniform(size=(ROWS, TOKENS))

    def gradients(hidden, head, tokens, weights):
        def sums(hidden, head):
            found = next_token_loss(hidden, tokens, weights, head, lambda head, x, *_: x @ head, chunk=8)
            return found["loss"], found

        return jax.grad(sums, (0, 1), has_aux=True)(hidden, head)

    rows = ("act_batch", None)
    arrays = (hidden.astype(np.float32), head.astype(np.float32), tokens.astype(np.int32), weights.astype(np.float32))
    return compare(gradients, gradients, arrays, ((*rows, None), ("embed", "vocab"), rows, rows))


def generation() -> dict[str, Any]:
    """Prompts with images, answered on one device and with each layer cut over two."""
    params, batch = tiny.params(), tiny.batch(0)
    batch["segment_ids"][:], batch["positions"][:] = 1, np.arange(tiny.SHAPE.tokens)
    decoding = Decoding(max_new_tokens=6, stop_ids=(), banned_ids=(), temperature=0.0, top_p=1.0, unroll=True)
    found = []
    for devices in (1, 2):
        cut = cut_over(devices)
        placed = jax.device_put(params, param_shardings(tiny.CONFIG, **cut))
        with sharding.use_mesh(*cut.values()):
            tokens, _ = generate(tiny.MODEL, {"params": placed}, batch, decoding, jax.random.key(0))
        found.append(np.asarray(tokens).tolist())
    try:
        check_cut(tiny.CONFIG, param_shardings(tiny.CONFIG, **cut_over(5)))
        refusal = None
    except UserError as error:
        refusal = str(error)
    kernel = placed["text_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    return {"tokens": found, "refusal": refusal, "kernel on a device": kernel.addressable_shards[0].data.shape}


def compare(sharded: Callable, alone: Callable, arrays: tuple, names: tuple) -> dict[str, Any]:
    """Returns the largest error of any result, in parts of its largest number, and what the devices send, by loop."""
    expected = jax.tree.leaves(jax.jit(alone)(*arrays))
    with sharding.use_mesh(sharding.make_mesh(SIZES), RULES) as mesh:
        places = [NamedSharding(mesh, sharding.spec(axes, RULES)) for axes in names]
        compiled = jax.jit(sharded, in_shardings=places).lower(*arrays).compile()
        found = jax.tree.leaves(compiled(*map(jax.device_put, arrays, places)))
    sent = re.findall(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)\((.*?)op_name=\"([^\"]*)", compiled.as_text())
    sent = [it for it in sent if not re.search(r"replica_groups=(\{\{\d+\}[,}]|\[8,1\])", it[2])]  # each with itself
    return {
        "error": max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True)),
        "sent in loops": sorted({f"{kind} {shape}" for shape, kind, _, name in sent if "while" in name}),
        "sent": sorted({kind for _, kind, _, name in sent if "while" not in name}),
        "shapes": sorted(set(re.findall(r"f32\[[\d,]+\]", compiled.as_text()))),
    }


if __name__ == "__main__":
    main()
