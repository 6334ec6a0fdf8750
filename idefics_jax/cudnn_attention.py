"""Attention on GPU through cuDNN's kernel (jax.nn.dot_product_attention), a few rows at a time.

cuDNN takes what a query sees as a dense array for each row, and computes all pairs. So that no array of all rows
exists, they are taken a few at a time, and each time's array is made anew in the backward pass.
"""

import jax
import jax.numpy as jnp

from idefics_jax.visibility import Visibility

# Numbers of the dense arrays that exist at once: 512 MiB in bfloat16.
DENSE = 2**28
# Lengths are filled up to a multiple: training with a dense array needs even ones, and kernels work in such tiles.
TILE = 64


def fits(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Returns whether cuDNN takes such arrays, forward and backward, on the devices there are; it says so itself."""
    if jax.default_backend() != "gpu":
        return False
    segments = (jax.ShapeDtypeStruct(x.shape[:2], jnp.int32) for x in (query, key))
    arrays = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value))

    def gradients(query, key, value, *segments):
        def score(*x):
            out = cudnn_attention(*x, Visibility(*segments), implementation="cudnn")
            return jnp.sum(out.astype(jnp.float32))

        return jax.grad(score, (0, 1, 2))(query, key, value)

    try:
        jax.eval_shape(gradients, *arrays, *segments)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    *,
    implementation: str,
    dense: int = DENSE,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads, on one device.

    Args:
      query: [B, T, N, H], bfloat16 or float16 for cuDNN.
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, H].
      visibility: what each query sees. A query that sees nothing gets a finite, meaningless result.
      implementation: of jax.nn.dot_product_attention: "cudnn", or its twin "xla" on any device.
      dense: how many numbers of the dense arrays exist at once, but for those of a single row.

    Returns:
      [B, T, N, H] in the query's dtype.
    """
    batch, length = query.shape[:2]
    arrays = jax.tree.map(_filled, (query, key, value, visibility))
    pairs = arrays[0].shape[1] * arrays[1].shape[1]
    rows = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * pairs <= dense))

    @jax.checkpoint
    def few(arrays):
        query, key, value, seen = arrays
        unseen = jnp.where(seen.mask(seen.query_segments, seen.query_positions), 0.0, jnp.finfo(query.dtype).min / 2)
        bias = unseen.astype(query.dtype)[:, None]
        return jax.nn.dot_product_attention(query, key, value, bias=bias, implementation=implementation)

    out = jax.lax.map(few, jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), arrays))
    return out.reshape(batch, *out.shape[2:])[:, :length]


def _filled(x: jax.Array) -> jax.Array:
    """Fills the second axis up to a multiple of TILE with zeros: padding, which nothing sees."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), *((0, 0),) * (x.ndim - 2)))
