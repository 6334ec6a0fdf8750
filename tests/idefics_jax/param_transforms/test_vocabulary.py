"""A vocabulary grows at its end and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idefics_jax.param_transforms import vocabulary

OLD, NEW, WIDTH = 50, 53, 256


@pytest.fixture(params=["float32", "bfloat16"])
def params(request):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((OLD, WIDTH)) + 1, request.param)
    head = jnp.asarray(rng.standard_normal((WIDTH, OLD)) - 1, request.param)
    return {"text_model": {"embed_tokens": {"embedding": table}, "lm_head": {"kernel": head}}}


def grown(params, **arguments):
    text = vocabulary.grow(params, NEW, rng=jax.random.key(0), **arguments)["text_model"]
    return text["embed_tokens"]["embedding"], text["lm_head"]["kernel"].T


@pytest.mark.parametrize("start", vocabulary.STARTS)
def test_old_rows_are_bit_identical_and_the_dtype_stays(params, start):
    old = params["text_model"]["embed_tokens"]["embedding"], params["text_model"]["lm_head"]["kernel"].T
    for before, after in zip(old, grown(params, start=start), strict=True):
        assert (after.shape, after.dtype) == ((NEW, WIDTH), before.dtype)
        np.testing.assert_array_equal(after[:OLD], before)


def test_rows_start_as_the_mean_of_the_old_ones(params):
    for table in grown(params, start="mean"):
        mean = np.asarray(table[:OLD], np.float64).mean(0)
        np.testing.assert_allclose(np.asarray(table[OLD:], np.float64), np.tile(mean, (3, 1)), rtol=1e-2, atol=1e-2)


def test_rows_start_apart_with_the_width_s_standard_deviation(params):
    embeddings, head = (np.asarray(table[OLD:], np.float32) for table in grown(params, start="normal"))
    for rows in (embeddings, head):
        assert abs(rows.std() * WIDTH**0.5 - 1) < 0.1
        assert len(np.unique(rows, axis=0)) == NEW - OLD
    assert not np.array_equal(embeddings, head)


def test_a_tied_head_has_no_rows_of_its_own(params):
    del params["text_model"]["lm_head"]
    assert set(vocabulary.grow(params, NEW, start="mean", rng=jax.random.key(0))["text_model"]) == {"embed_tokens"}


def test_a_vocabulary_does_not_shrink(params):
    with pytest.raises(ValueError, match="has 50 rows; a vocabulary grows, and cannot shrink to 49"):
        vocabulary.grow(params, 49, start="mean", rng=jax.random.key(0))
