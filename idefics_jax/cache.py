"""The key/value cache of the decoder: fixed-size buffers that tokens are written into in order.

    {"layers": {"key": [L, B, K, S, H], "value": [L, B, K, S, H]},
     "tokens": {"segment_ids": int32 [B, S], "positions": int32 [B, S]},
     "index": int32 []}            tokens written so far

Keys lie as attention reads them, S before H, so that a step of decoding does not transpose the cache.
Where the decoder runs unrolled, "layers" is a tuple of L {"key", "value"} without their leading axis: each buffer is
then written in place, where a scan copies all of them at every token.

A slot whose segment id is 0 has not been written, or holds padding: nothing sees it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from idefics_jax.config import TextConfig

Cache = dict[str, Any]


def empty_cache(config: TextConfig, *, batch: int, length: int, dtype: jnp.dtype) -> Cache:
    """Returns a cache with room for `length` tokens in each of `batch` rows."""
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
    return {
        "layers": {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)},
        "tokens": {
            "segment_ids": jnp.zeros((batch, length), jnp.int32),
            "positions": jnp.zeros((batch, length), jnp.int32),
        },
        "index": jnp.zeros((), jnp.int32),
    }


def write(
    buffers: dict[str, jax.Array], new: dict[str, jax.Array], index: jax.Array, *, axis: int
) -> dict[str, jax.Array]:
    """Writes `new` (T slots along `axis`) into `buffers` (S slots along it) from slot `index` on."""
    return {
        name: jax.lax.dynamic_update_slice_in_dim(buffer, new[name].astype(buffer.dtype), index, axis=axis)
        for name, buffer in buffers.items()
    }
