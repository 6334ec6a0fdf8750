"""Attention on TPU that computes only those blocks of scores that hold a visible pair (a kernel in Pallas).

Rows are packed: images in a vision row, documents in a row of text. Which pairs of blocks have anything in common is
known from their ids before the kernel starts, so the grid is the list of those pairs, and its length the work: the
sum of the images' squared sizes, not the square of the row's. The list is prefetched; nothing runs for other blocks.

The arithmetic is FlashAttention's (Dao et al., 2022): softmax a block at a time, and a backward pass that recomputes
the weights from their log-sums, here in one kernel that makes the gradients of queries, keys and values together.

Tokens lie along the lanes, [.., H, T], and scores as [keys, queries]. Maxima and sums of a query then run down the
sublanes, which costs no shuffling of lanes, and the products with 72 numbers a head do not stream 128: by the
compiler's schedule for a v5e that is half the cycles of the usual orientation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from idefics_jax.visibility import Visibility

# Queries and keys of a block of scores. Larger blocks compute more that nobody sees, smaller ones run slower a pair:
# 256 is the cheapest on each stage's mix by the compiler's schedule (benchmarks.vision_attention).
BLOCK = 256
# Heads that a step of the grid computes, where memory allows: their chains of instructions overlap.
HEADS = 8
# What is saved of the forward pass carries this name, and what goes in that one (stack.REMAT_POLICIES).
SAVED, OPERANDS = "attention", "attention_operands"
# Block pairs that a call may list: the list lies in the scalar memory, of 1 MiB, as one int32 each.
MAX_PAIRS = 200_000
_LOG2E = 1.4426950408889634
_UNSEEN = -1e30


def flash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility, *, interpret: bool
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads, on one device.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, H].
      visibility: what each query sees. A query that sees nothing gets zeros.
      interpret: whether the kernel's operations run one by one, on any device, and not compiled.

    Returns:
      [B, T, N, H] in the query's dtype.

    Raises:
      ValueError: a row has more pairs of blocks than can be listed.
    """
    batch, length = query.shape[:2]
    queries, keys = pl.cdiv(length, BLOCK), pl.cdiv(key.shape[1], BLOCK)
    if queries * keys > MAX_PAIRS:
        raise ValueError(
            f"attention of {length} queries to {key.shape[1]} keys has more than {MAX_PAIRS} pairs of blocks of "
            f"{BLOCK}, the most that can be listed; make the rows shorter"
        )
    calls = min(n for n in range(1, batch + 1) if batch % n == 0 and batch // n * queries * keys <= MAX_PAIRS)
    arrays = query, key, value, visibility
    if calls == 1:
        return _of_rows(arrays, interpret)
    out = jax.lax.map(
        functools.partial(_of_rows, interpret=interpret),
        jax.tree.map(lambda x: x.reshape(calls, -1, *x.shape[1:]), arrays),
    )
    return out.reshape(query.shape)


def _of_rows(arrays: tuple[jax.Array, jax.Array, jax.Array, Visibility], interpret: bool) -> jax.Array:
    """Computes as many rows as can be listed."""
    query, key, value, visibility = arrays
    length, head_dim = query.shape[1], query.shape[3]
    query = query * (head_dim**-0.5 * _LOG2E)  # the kernel's exponentials are powers of two
    active = active_blocks(visibility)
    pairs = (*_listed(active), *_listed(active.swapaxes(1, 2)))
    tables = tuple(x[:, None] for x in _tables(visibility))
    operands = [checkpoint_name(_padded(x.transpose(0, 2, 3, 1), -1, 0), OPERANDS) for x in (query, key, value)]
    out = _flash(interpret, *operands, tables, pairs)
    return out[..., :length].transpose(0, 3, 1, 2)


def _padded(x: jax.Array, axis: int, fill: int) -> jax.Array:
    """Fills an axis up to a multiple of BLOCK."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % BLOCK)
    return jnp.pad(x, widths, constant_values=fill)


def _tables(visibility: Visibility) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns Visibility.ranges filled up to whole blocks with what nothing sees."""
    return tuple(_padded(x, -1, fill) for x, fill in zip(visibility.ranges(), (1, 0, -1), strict=True))


def active_blocks(visibility: Visibility) -> jax.Array:
    """Returns bool [B, query blocks, key blocks]: whether a pair of blocks may hold a visible pair.

    A pair of blocks is active if the codes that its queries see and those of its keys overlap from end to end, and if
    they have a segment in common, of which 32 are told apart; so for segments in any order none is missed.
    """
    first, last, code = _tables(visibility)

    def blocks(x):
        return x.reshape(x.shape[0], -1, BLOCK)

    def segments(ids):
        bits = jnp.where(ids > 0, jnp.left_shift(1, ids % 32), 0)
        return jax.lax.reduce(blocks(_padded(bits, -1, 0)), 0, jax.lax.bitwise_or, (2,))

    limit = jnp.iinfo(jnp.int32).max
    lowest = blocks(jnp.where(first <= last, first, limit)).min(2)[:, :, None]
    highest = blocks(last).max(2)[:, :, None]
    overlap = lowest <= blocks(code).max(2)[:, None]
    overlap &= highest >= blocks(jnp.where(code < 0, limit, code)).min(2)[:, None]
    shared = segments(visibility.query_segments)[:, :, None] & segments(visibility.key_segments)[:, None]
    return overlap & (shared != 0)


@dataclasses.dataclass(frozen=True)
class _Packing:
    """How a row, an outer and an inner block are one int32, in whose order they are visited.

    Attributes:
      outer, inner: bits of a block's number.
    """

    outer: int
    inner: int

    @classmethod
    def of(cls, outer_blocks: int, inner_blocks: int) -> "_Packing":
        return cls(max(1, (outer_blocks - 1).bit_length()), max(1, (inner_blocks - 1).bit_length()))

    def pack(self, row, outer, inner):
        return (row << self.outer + self.inner) + (outer << self.inner) + inner

    def row(self, pair):
        return pair >> self.outer + self.inner

    def outer_block(self, pair):
        return (pair >> self.inner) & (2**self.outer - 1)

    def inner_block(self, pair):
        return pair & (2**self.inner - 1)


def _listed(active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the packed active pairs in order, int32 [B * outer * inner], and their number, int32 [].

    An outer block without an active pair has its first one listed, so that each result is written.
    """
    active = active.at[:, :, 0].set(active[:, :, 0] | ~active.any(2))
    numbers = [jax.lax.broadcasted_iota(jnp.int32, active.shape, axis) for axis in range(3)]
    packed = _Packing.of(*active.shape[1:]).pack(*numbers)
    order = jnp.sort(jnp.where(active, packed, jnp.iinfo(jnp.int32).max).reshape(-1))
    return order, jnp.sum(active, dtype=jnp.int32)


def _ends(pairs: jax.Array, shift: int) -> tuple[jax.Array, jax.Array]:
    """Returns whether this step is the first, and the last, of those whose pairs are equal but for `shift` bits."""
    step, steps = pl.program_id(1), pl.num_programs(1)
    own = pairs[step] >> shift
    begins = (step == 0) | (pairs[jnp.maximum(step - 1, 0)] >> shift != own)
    return begins, (step == steps - 1) | (pairs[jnp.minimum(step + 1, steps - 1)] >> shift != own)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(interpret, query, key, value, tables, pairs):
    return _forward(interpret, query, key, value, tables, pairs)[0]


def _flash_fwd(interpret, query, key, value, tables, pairs):
    out, logsum = (checkpoint_name(x, SAVED) for x in _forward(interpret, query, key, value, tables, pairs))
    return out, (query, key, value, tables, pairs, out, logsum)


def _flash_bwd(interpret, saved, gradient):
    query, key, value, tables, pairs, out, logsum = saved
    weighted = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=2, keepdims=True)
    gradients = _backward(interpret, query, key, value, gradient, logsum, weighted, tables, pairs)
    return (*gradients, None, None)


_flash.defvjp(_flash_fwd, _flash_bwd)


def heads_a_step(heads: int, kv_heads: int, row_bytes: int) -> int:
    """Returns how many query heads a step computes: whole groups of them or a part of one, at most half of all.

    (A chip of two cores shares out the heads' steps.)

    Args:
      heads: N.
      kv_heads: K.
      row_bytes: what a head keeps in vector memory for a whole row (gradient_bytes), 0 in the forward pass.
    """
    group, room = heads // kv_heads, _vmem() * 5 // 8
    fits = [n for n in range(1, HEADS + 1) if heads % n == 0 and (n % group == 0 or group % n == 0) and 2 * n <= heads]
    return max((n for n in fits if n * row_bytes <= room), default=1)


def gradient_bytes(length: int, head_dim: int, itemsize: int) -> int:
    """Returns the bytes of the float32 sum of a row's gradient, and of the two buffers that it is written from."""
    return (4 + 2 * itemsize) * length * head_dim


def _vmem() -> int:
    """Returns the bytes of a core's vector memory; where there is no TPU, those of the smallest, a v4's."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else 2**24


def _forward(interpret, query, key, value, tables, pairs):
    """Returns the result [B, N, H, T], and the base-2 logarithm of each query's sum of weights, [B, N, 1, T]."""
    batch, heads, head_dim, length = query.shape
    group = heads // key.shape[1]
    step = heads_a_step(heads, key.shape[1], 0)
    kv_step = max(1, step // group)
    packing = _Packing.of(length // BLOCK, key.shape[3] // BLOCK)
    of_query, of_key = _table_spec(packing.row, packing.outer_block), _table_spec(packing.row, packing.inner_block)
    q_spec, kv_spec = (
        pl.BlockSpec((None, n, head_dim, BLOCK), index)
        for n, index in (
            (step, _index(packing.row, packing.outer_block)),
            (kv_step, _index(packing.row, packing.inner_block, lambda h: h * step // group // kv_step)),
        )
    )
    sum_spec = pl.BlockSpec((None, step, 1, BLOCK), _index(packing.row, packing.outer_block))
    return pl.pallas_call(
        functools.partial(_forward_step, packing=packing, step=step, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads // step, pairs[1]),
            in_specs=[of_query, of_query, of_key, q_spec, kv_spec, kv_spec],
            out_specs=[q_spec, sum_spec],
            scratch_shapes=[
                pltpu.VMEM((step, 1, BLOCK), jnp.float32),
                pltpu.VMEM((step, 1, BLOCK), jnp.float32),
                pltpu.VMEM((step, head_dim, BLOCK), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="flash_attention_forward",
    )(pairs[0], *tables, query, key, value)


def _forward_step(
    pairs, first, last, code, query, key, value, out, logsum, maximum, total, weighted, *, packing, step, group
):
    begins, ends = _ends(pairs, packing.inner)

    @pl.when(begins)
    def _():
        maximum[...] = jnp.full_like(maximum, _UNSEEN)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    seen = _seen(first, last, code)
    for head in range(step):
        kv = head // group
        scores = jnp.where(seen, _dot(key[kv], query[head], (0, 0)), _UNSEEN)
        old = maximum[head]
        new = jnp.maximum(old, jnp.max(scores, axis=0, keepdims=True))
        weights, decay = jnp.exp2(scores - new), jnp.exp2(old - new)
        maximum[head] = new
        total[head] = total[head] * decay + jnp.sum(weights, axis=0, keepdims=True)
        weighted[head] = weighted[head] * decay + _dot(value[kv], weights.astype(value.dtype), (1, 0))

    @pl.when(ends)
    def _():
        for head in range(step):
            found = maximum[head] > _UNSEEN
            out[head] = jnp.where(found, weighted[head] / total[head], 0.0).astype(out.dtype)
            logsum[head] = maximum[head] + jnp.log2(total[head])


def _seen(first, last, code) -> jax.Array:
    """Returns bool [keys, queries] of a pair of blocks."""
    codes = jnp.broadcast_to(code[...], (128, BLOCK)).T[:, :1]
    return (codes >= first[...]) & (codes <= last[...])


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _index(row, block, heads=lambda head: head):
    """Returns where in [B, heads, H, tokens] a step finds its block, by functions of the pair and the grid's head."""
    return lambda head, step, pairs: (row(pairs[step]), heads(head), 0, block(pairs[step]))


def _table_spec(row, block) -> pl.BlockSpec:
    """Returns where in a table [B, 1, tokens] a step finds its block, by functions of the pair."""
    return pl.BlockSpec((None, 1, BLOCK), lambda head, step, pairs: (row(pairs[step]), 0, block(pairs[step])))


def _backward(interpret, query, key, value, gradient, logsum, weighted, tables, pairs):
    """Returns the gradients of query, key and value.

    `logsum` is the forward pass's, `weighted` the product of each query's result and its gradient, [B, N, 1, T].
    """
    batch, heads, head_dim, length = query.shape
    group = heads // key.shape[1]
    row_bytes = gradient_bytes(length, head_dim, query.dtype.itemsize)
    step = heads_a_step(heads, key.shape[1], row_bytes)
    kv_step = max(1, step // group)
    packing = _Packing.of(key.shape[3] // BLOCK, length // BLOCK)
    of_query, of_key = _table_spec(packing.row, packing.inner_block), _table_spec(packing.row, packing.outer_block)
    q_index = _index(packing.row, packing.inner_block)
    q_spec, sum_spec = (pl.BlockSpec((None, step, size, BLOCK), q_index) for size in (head_dim, 1))
    kv_index = _index(packing.row, packing.outer_block, lambda h: h * step // group // kv_step)
    kv_spec = pl.BlockSpec((None, kv_step, head_dim, BLOCK), kv_index)
    row_spec = pl.BlockSpec((None, step, head_dim, length), lambda h, s, p: (packing.row(p[s]), h, 0, 0))
    # Where a step has only part of a group, its part of the gradients of keys and values is summed below.
    parts = heads // step * kv_step
    part_spec = pl.BlockSpec((None, kv_step, head_dim, BLOCK), _index(packing.row, packing.outer_block))
    part = jax.ShapeDtypeStruct((batch, parts, *key.shape[2:]), key.dtype if step >= group else jnp.float32)
    of_queries, of_keys, of_values = pl.pallas_call(
        functools.partial(_backward_step, packing=packing, step=step, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads // step, pairs[3]),
            in_specs=[of_query, of_query, of_key, q_spec, kv_spec, kv_spec, q_spec, sum_spec, sum_spec],
            out_specs=[row_spec, part_spec, part_spec],
            scratch_shapes=[
                pltpu.VMEM((step, head_dim, length), jnp.float32),
                pltpu.VMEM((kv_step, head_dim, BLOCK), jnp.float32),
                pltpu.VMEM((kv_step, head_dim, BLOCK), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype), part, part],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # Blocks of queries, scores, and for each head of keys its blocks, their buffers and their sums.
            vmem_limit_bytes=min(_vmem(), step * row_bytes + 2**23 + kv_step * 2**20),
        ),
        interpret=interpret,
        name="flash_attention_backward",
    )(pairs[2], *tables, query, key, value, gradient, logsum, weighted)
    if step < group:
        of_keys, of_values = (
            x.reshape(batch, key.shape[1], -1, *key.shape[2:]).sum(2).astype(key.dtype) for x in (of_keys, of_values)
        )
    return of_queries, of_keys, of_values


def _backward_step(
    pairs,
    first,
    last,
    code,
    query,
    key,
    value,
    gradient,
    logsum,
    weighted,
    of_query,
    of_key,
    of_value,
    query_sum,
    key_sum,
    value_sum,
    *,
    packing,
    step,
    group,
):
    row_begins, row_ends = _ends(pairs, packing.outer + packing.inner)
    begins, ends = _ends(pairs, packing.inner)

    @pl.when(row_begins)
    def _():
        @pl.loop(0, query_sum.shape[2] // BLOCK)
        def _(block):
            query_sum[:, :, _tokens(block)] = jnp.zeros((step, query_sum.shape[1], BLOCK), jnp.float32)

    @pl.when(begins)
    def _():
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)

    seen = _seen(first, last, code)
    queries = _tokens(packing.inner_block(pairs[pl.program_id(1)]))
    for head in range(step):
        kv = head // group
        scores = _dot(key[kv], query[head], (0, 0))
        weights = jnp.where(seen, jnp.exp2(scores - logsum[head]), 0.0)
        value_sum[kv] += _dot(gradient[head], weights.astype(gradient.dtype), (1, 1))
        of_weights = _dot(value[kv], gradient[head], (0, 0))
        of_scores = (weights * (of_weights - weighted[head])).astype(key.dtype)
        key_sum[kv] += _dot(query[head], of_scores, (1, 1))
        query_sum[head, :, queries] += _dot(key[kv], of_scores, (1, 0))

    # Scores are in powers of two: their derivative has a factor of ln 2.
    @pl.when(ends)
    def _():
        of_key[...] = (key_sum[...] / _LOG2E).astype(of_key.dtype)
        of_value[...] = value_sum[...].astype(of_value.dtype)

    @pl.when(row_ends)
    def _():
        @pl.loop(0, query_sum.shape[2] // BLOCK)
        def _(block):
            of_query[:, :, _tokens(block)] = (query_sum[:, :, _tokens(block)] / _LOG2E).astype(of_query.dtype)


def _tokens(block) -> pl.Slice:
    return pl.ds(block * BLOCK, BLOCK)
