"""Attention and rotary positions against the reference's functions, and a block at a time against the whole."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MistralConfig
from transformers.models.mistral import modeling_mistral

from idefics_jax import attention
from idefics_jax.attention import Visibility, attend, rotary
from tests.idefics_jax import reference
from tests.idefics_jax.reference import LEAF

BATCH, QUERIES, KEYS, HEADS, HEAD_DIM = 2, 11, 13, 4, 6
QUERY_SEGMENTS = [[1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2]]
KEY_SEGMENTS = [[1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0, 1, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 0, 2]]
QUERY_POSITIONS = [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 0], [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0]]
KEY_POSITIONS = [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 0, 4, 3], [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 1]]


def visibility(*, ordered: bool, window: int | None) -> Visibility:
    segments = jnp.array(QUERY_SEGMENTS), jnp.array(KEY_SEGMENTS)
    if not ordered:
        return Visibility(*segments)
    return Visibility(*segments, jnp.array(QUERY_POSITIONS), jnp.array(KEY_POSITIONS), window)


def inputs(kv_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((BATCH, QUERIES, HEADS, HEAD_DIM), *((BATCH, KEYS, kv_heads, HEAD_DIM),) * 2)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize(("ordered", "window"), [(False, None), (True, None), (True, 3), (True, 1)])
def test_a_query_sees_its_segment_up_to_its_position_within_the_window(ordered, window):
    seen = visibility(ordered=ordered, window=window)
    mask = seen.mask(seen.query_segments, seen.query_positions)
    for b in range(BATCH):
        for t in range(QUERIES):
            for s in range(KEYS):
                expected = QUERY_SEGMENTS[b][t] == KEY_SEGMENTS[b][s] != 0
                if ordered:
                    distance = QUERY_POSITIONS[b][t] - KEY_POSITIONS[b][s]
                    expected = expected and 0 <= distance < (window or 100)
                assert bool(mask[b, t, s]) == expected, (b, t, s)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_are_the_reference_s(kv_heads):
    seen = visibility(ordered=True, window=3)
    mask = np.asarray(seen.mask(seen.query_segments, seen.query_positions))
    query, key, value = inputs(kv_heads)
    layer = torch.nn.Module()
    layer.num_key_value_groups = HEADS // kv_heads
    expected, _ = modeling_mistral.eager_attention_forward(
        layer,
        *(torch.from_numpy(x).transpose(1, 2) for x in (query, key, value)),
        torch.from_numpy(np.where(mask, 0, np.finfo(np.float32).min)[:, None].astype(np.float32)),
        scaling=HEAD_DIM**-0.5,
    )
    ours = np.asarray(attend(query, key, value, seen))
    sighted = mask.any(-1)
    np.testing.assert_allclose(ours[sighted], expected.numpy()[sighted], rtol=LEAF, atol=LEAF)


def test_a_query_that_sees_nothing_is_finite_and_so_are_its_gradients():
    seen = visibility(ordered=True, window=None)
    assert not np.asarray(seen.mask(seen.query_segments, seen.query_positions)).any(-1).all()
    grad = jax.grad(lambda *x: jnp.sum(attend(*x, seen) ** 2), argnums=(0, 1, 2))
    gradients = reference.jit(grad)(*inputs(2))
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("block", [4, 1, 10])
@pytest.mark.parametrize("ordered", [True, False])
def test_attention_a_block_at_a_time_is_attention_of_the_whole(monkeypatch, block, ordered):
    """11 queries, so the last block is never full; values and gradients."""
    seen = visibility(ordered=ordered, window=3)
    weight = np.random.default_rng(1).normal(size=(BATCH, QUERIES, HEADS, HEAD_DIM)).astype(np.float32)
    # Padding queries are meaningless on both sides.
    weight *= (np.array(QUERY_SEGMENTS) > 0)[..., None, None]

    def score(*x):
        out = attend(*x, seen) * weight
        return jnp.sum(out), out

    compute = jax.value_and_grad(score, argnums=(0, 1, 2), has_aux=True)
    (_, whole), whole_gradients = compute(*inputs(2))
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    (_, blocks), gradients = reference.jit(compute)(*inputs(2))
    for a, b in zip((blocks, *gradients), (whole, *whole_gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=LEAF, atol=LEAF)


def test_blocks_never_hold_all_queries_against_all_keys(monkeypatch):
    """Neither the forward nor the backward pass has an array of T x S numbers."""
    length = 97

    def largest():
        x = jax.ShapeDtypeStruct((1, length, 1, 2), jnp.float32)
        ids = jnp.ones((1, length), jnp.int32)
        grad = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, Visibility(ids, ids, ids, ids))))
        shapes = re.findall(r"tensor<([0-9x]+)x[a-z]", jax.jit(grad).lower(x, x, x).as_text())
        return max(np.prod([int(size) for size in shape.split("x")]) for shape in shapes)

    assert largest() >= length * length
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    assert largest() < length * length / 4


def test_bf16_scores_are_kept_in_float32():
    """Scores of 128.5 and 128, which bf16 cannot tell apart."""
    query = jnp.array([16.0, 1, 0, 0], jnp.bfloat16).reshape(1, 1, 1, 4)
    key = jnp.array([[16.0, 1, 0, 0], [16, 0, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    value = jnp.array([1.0, 0], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones(4, jnp.bfloat16)
    ones = jnp.ones((1, 2), jnp.int32)
    out = attend(query, key, value, Visibility(ones[:, :1], ones))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1 / (1 + np.exp(-0.5)), rtol=2**-8)


@pytest.mark.parametrize(("head_dim", "theta"), [(12, 10000.0), (128, 10000.0), (128, 1e6)])
def test_rotary_is_the_reference_s_up_to_the_last_position(head_dim, theta):
    positions = np.array([[0, 1, 2, 3, 100, 2047, 4096, 32767], [5, 0, 0, 1, 9, 11, 30000, 77]], np.int32)
    x = np.random.default_rng(0).normal(size=(*positions.shape, 3, head_dim)).astype(np.float32)
    config = MistralConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    embedding = modeling_mistral.MistralRotaryEmbedding(config)
    cos, sin = embedding(torch.from_numpy(x), torch.from_numpy(positions))
    expected, _ = modeling_mistral.apply_rotary_pos_emb(*(torch.from_numpy(x),) * 2, cos, sin, unsqueeze_dim=2)
    ours = jax.jit(rotary, static_argnums=2)(x, positions, theta)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=LEAF, atol=LEAF)


def test_rotary_keeps_the_dtype_and_turns_in_float32():
    """In bf16, positions above 256 would run together."""
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    turned = rotary(x, jnp.array([[1000, 1001]]), 10000.0)
    exact = rotary(x.astype(jnp.float32), jnp.array([[1000, 1001]]), 10000.0)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(turned, np.float32), exact, atol=2**-8, rtol=2**-8)
