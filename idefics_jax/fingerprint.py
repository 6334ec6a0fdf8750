"""A few integers that tell whether an array came back as it was saved.

Neither Orbax nor safetensors notices a flipped bit. Each leaf's words are summed modulo 2**32, every word times an
odd number made of its index: any change of one word changes the sum, and so does a swap. Integer sums do not depend
on their order, so the value is the same on every mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


# A program for each shape, of which a model has few: trees come in many forms, and each would be compiled anew.
@jax.jit
def _sum(leaf: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
    weights = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        weights += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words * (2 * weights + 1), dtype=jnp.uint32)


def fingerprint(tree: Any) -> dict[str, int]:
    """Returns {path: sum} over the leaves of a tree of arrays of 1, 2 or 4 bytes an item."""
    sums = {jax.tree_util.keystr(path): _sum(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    return {path: int(value) for path, value in jax.device_get(sums).items()}


def changed(tree: Any, wanted: dict[str, int]) -> list[str]:
    """Returns the sorted paths of leaves whose sums are not those of a `fingerprint` taken earlier."""
    found = fingerprint(tree)
    return sorted(path for path in {*wanted, *found} if wanted.get(path) != found.get(path))
