"""Dropout whose mask is reckoned where it is used: a few integer operations a number, nothing of x's size in memory.

JAX's own bits (threefry) take some hundred operations each and lie in memory before they are used, which makes a 7B
LoRA step of a v5p a sixth longer by its compiler's estimate, where this takes 2 per cent. A mask needs no such care:
each number is kept or not by a hash of its place and the key. Like JAX's, it is the same however the array is cut over
devices.
"""

import jax
import jax.numpy as jnp


def dropped(x: jax.Array, rate: jax.Array, rng: jax.Array) -> jax.Array:
    """Sets a share of x to zero and scales up what is kept, so that the mean stays.

    Args:
      x: [.., D]; up to 2**32 rows of it have masks of their own.
      rate: float32 [], the share, below 1.
      rng: key.

    Returns:
      The same shape and dtype.
    """
    first, second = jax.random.bits(rng, (2,), jnp.uint32)
    row = jnp.zeros((*x.shape[:-1], 1), jnp.uint32)
    for dim, size in enumerate(x.shape[:-1]):
        row = row * size + jax.lax.broadcasted_iota(jnp.uint32, row.shape, dim)
    column = jax.lax.broadcasted_iota(jnp.uint32, (1,) * (x.ndim - 1) + x.shape[-1:], x.ndim - 1)
    mixed = _mixed(_mixed(row ^ first) ^ _mixed(column ^ second))
    kept = 1.0 - rate
    # 24 bits: float32 holds them exactly, and comparing signed numbers is one operation.
    keep = (mixed >> 8).astype(jnp.int32) < (kept * 2**24).astype(jnp.int32)
    return jnp.where(keep, x / kept.astype(x.dtype), 0)


def _mixed(x: jax.Array) -> jax.Array:
    """Returns a permutation of the uint32s in which each bit of x turns over half of the bits (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)
