"""One attention for every part: grouped heads, rotary positions, and masks as data.

What may see what is never a dense [T, S] array held by a caller: it is a few integers a token (`Visibility`), from
which each block of queries makes its own mask. On TPU a kernel computes the blocks that hold a visible pair and no
others (flash_attention.py), on GPU cuDNN computes what it takes (cudnn_attention.py). Elsewhere, and for float32, long
sequences are computed a block of queries at a time under `jax.checkpoint`, so memory grows with the length, not with
its square.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from idefics_jax import cudnn_attention
from idefics_jax.flash_attention import BLOCK, flash_attention
from idefics_jax.sharding import mesh_axes
from idefics_jax.visibility import Visibility

# Queries computed at once without the kernel; a shorter sequence is computed whole.
QUERY_BLOCK = 512
# Queries from which on the kernel is worth its blocks; a step of decoding is a product of a vector.
KERNEL_QUERIES = 128


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    heads: tuple[str, str] = ("heads", "kv_heads"),
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads; softmax in float32.

    In bfloat16 and unless the queries are few, it is a kernel of the platform's, each device computing its own rows and
    heads.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, H].
      visibility: what each query sees. A query that sees nothing gets a finite, meaningless result.
      heads: logical names of the axes N and K (sharding.RULES).

    Returns:
      [B, T, N, H] in the query's dtype.
    """
    if query.dtype == jnp.bfloat16 and query.shape[1] >= KERNEL_QUERIES:
        if pltpu.is_tpu_device():
            kernel = functools.partial(flash_attention, interpret=False)
            return of_own_rows(kernel, query, key, value, visibility, heads)
        if cudnn_attention.fits(query, key, value):
            kernel = functools.partial(cudnn_attention.cudnn_attention, implementation="cudnn")
            return of_own_rows(kernel, query, key, value, visibility, heads)
    return _attend_blocks(query, key, value, visibility)


def filled_length(length: int, dtype: jnp.dtype) -> int:
    """Returns the length that rows are best filled up to before layers of attention, at most an eighth more.

    The kernel of a TPU takes whole blocks, and would copy what is shorter into them in every layer.
    """
    whole = -(-length // BLOCK) * BLOCK
    kernel = dtype == jnp.bfloat16 and length >= KERNEL_QUERIES and pltpu.is_tpu_device()
    return whole if kernel and whole - length <= length // 8 else length


def of_own_rows(
    kernel: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    heads: tuple[str, str],
) -> jax.Array:
    """Runs a kernel on each device's own rows and heads of the current mesh; nothing is sent between devices.

    Rows that cannot be dealt out evenly are computed everywhere, and so are heads.

    Args:
      kernel: query, key, value and visibility of one device -> its result.
      query, key, value, visibility, heads: as `attend` takes them.
    """
    if not nn.get_logical_axis_rules():
        return kernel(query, key, value, visibility)
    rows = mesh_axes("act_batch", query.shape[0])
    cut = mesh_axes(heads[0], query.shape[2])
    cut = cut if cut == mesh_axes(heads[1], key.shape[2]) else ()  # a group of heads stays with its keys
    place, of_rows = PartitionSpec(rows, None, cut), jax.tree.map(lambda _: PartitionSpec(rows), visibility)
    return jax.shard_map(kernel, in_specs=(place, place, place, of_rows), out_specs=place, check_vma=False)(
        query, key, value, visibility
    )


def _attend_blocks(query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility) -> jax.Array:
    length = query.shape[1]
    if length <= QUERY_BLOCK:
        mask = visibility.mask(visibility.query_segments, visibility.query_positions)
        return _attend_block(query, key, value, mask)

    blocks = -(-length // QUERY_BLOCK)
    size = -(-length // blocks)  # equal blocks: a last one that is mostly padding would cost as much as the others

    def split(x):
        """[B, T, ...] -> [blocks, B, size, ...], padded with zeros."""
        x = jnp.pad(x, ((0, 0), (0, blocks * size - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def block(queries):
        block_query, segments, positions = queries
        return _attend_block(block_query, key, value, visibility.mask(segments, positions))

    out = jax.lax.map(block, jax.tree.map(split, (query, visibility.query_segments, visibility.query_positions)))
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape[0], blocks * size, *query.shape[2:])
    return out[:, :length]


def _attend_block(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # The queries of all G heads of a key head as rows of one matrix, [B, K, G * T, H].
    query = (query * head_dim**-0.5).reshape(batch, length, kv_heads, -1, head_dim)
    query = query.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("BKTH,BKSH->BKTS", query, key, preferred_element_type=jnp.float32)
    # The lowest finite value, not -inf: a row that sees nothing must not turn into NaN. Added, not selected: XLA makes
    # what is the same in every layer once, and a mask to select by would be kept for every head.
    unseen = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    scores = scores.reshape(batch, kv_heads, -1, *mask.shape[1:]) + unseen[:, None, None]
    scores = scores.reshape(*query.shape[:3], -1)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    # Divided by the total last, where there are H numbers a query and not S.
    out = jnp.einsum("BKTS,BKSH->BKTH", weights.astype(value.dtype), value, preferred_element_type=jnp.float32) / total
    out = out.astype(value.dtype).reshape(batch, kv_heads, -1, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates the two halves of each head by position (reference: MistralRotaryEmbedding, rotate_half).

    Args:
      x: [B, T, N, H].
      positions: int32 [B, T].
      theta: base of the frequencies.

    Returns:
      [B, T, N, H] in x's dtype; angles and the rotation are float32.
    """
    angles = positions[..., None, None].astype(jnp.float32) * _frequencies(x.shape[-1], theta)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _frequencies(head_dim: int, theta: float) -> np.ndarray:
    """float32 [head_dim / 2]: the angle one step turns each pair by.

    Worked out on the host in the reference's float32 steps: one unit in the last place here is 0.002 radians at
    position 32,767, and accelerators compute powers less exactly than that.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / np.power(theta, exponents, dtype=np.float64).astype(np.float32)
