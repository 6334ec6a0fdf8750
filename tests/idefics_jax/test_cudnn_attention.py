"""Attention on GPU: what surrounds cuDNN's kernel, with XLA's in its place, against our own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idefics_jax import cudnn_attention
from idefics_jax.attention import attend
from idefics_jax.visibility import Visibility
from tests.idefics_jax import reference

B, T, HEADS, HEAD_DIM = 4, 75, 4, 8


def arrays() -> tuple[list[jax.Array], jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (B, T)), axis=1)[:, ::-1]
    positions = np.stack([[sum(row[:t] == row[t]) for t in range(T)] for row in segments])
    x = [jnp.asarray(rng.normal(size=(B, T, heads, HEAD_DIM)), jnp.float32) for heads in (HEADS, 2, 2)]
    return x, jnp.asarray(segments, jnp.int32), jnp.asarray(positions, jnp.int32)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_few_rows_at_a_time_are_all_of_them_with_their_gradients(rows, ordered):
    """75 tokens are filled up to 128."""
    x, segments, positions = arrays()
    seen = Visibility(segments, segments, positions, positions, 20) if ordered else Visibility(segments, segments)

    def compute(fn):
        def score(*x):
            out = jnp.where(segments[..., None, None] > 0, fn(*x, seen), 0.0)
            return jnp.sum(out**2), out

        return jax.tree.leaves(reference.jit(jax.value_and_grad(score, (0, 1, 2), has_aux=True))(*x))

    def ours(*x):
        return cudnn_attention.cudnn_attention(*x, implementation="xla", dense=rows * 128**2)

    for a, b in zip(compute(ours), compute(attend), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_cudnn_is_not_chosen_where_it_is_not():
    x = jnp.ones((1, 128, 1, 8), jnp.bfloat16)
    assert not cudnn_attention.fits(x, x, x)
