"""Dropout's mask: of the given rate and without a pattern. That a mesh leaves it as it is, test_sharding.py shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idefics_jax.dropout import dropped

ROWS, WIDTH = 2048, 512


def mask(seed, rate=0.1, shape=(ROWS, WIDTH)):
    return np.asarray(jax.jit(dropped)(jnp.ones(shape), jnp.float32(rate), jax.random.key(seed))) > 0


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_rate_is_met_and_what_is_kept_is_scaled_up(rate):
    y = np.asarray(dropped(jnp.ones((ROWS, WIDTH)), jnp.float32(rate), jax.random.key(0)))
    deviation = np.sqrt(rate * (1 - rate) / y.size)
    assert abs((y == 0).mean() - rate) <= 4 * deviation
    np.testing.assert_allclose(y[y > 0], 1 / (1 - rate), rtol=1e-5)


def test_places_drop_out_independently_of_their_neighbours_rows_columns_and_keys():
    first = mask(0, 0.5)
    others = {
        "next column": np.roll(first, 1, 1),
        "next row": np.roll(first, 1, 0),
        "half a row": np.roll(first, WIDTH // 2, 1),
        "many rows": np.roll(first, 1024, 0),
        "next key": mask(1, 0.5),
    }
    for name, other in others.items():
        # Of pairs that are independent half are equal, within four standard deviations.
        assert abs((first == other).mean() - 0.5) < 4 * 0.5 / np.sqrt(first.size), name
    for sums, count in ((first.sum(0), ROWS), (first.sum(1), WIDTH)):
        # Counts over a row or a column spread as a binomial's.
        np.testing.assert_allclose(sums.var(), count / 4, rtol=4 * np.sqrt(2 / len(sums)))


def test_no_two_rows_have_one_mask_across_leading_dims():
    rows = mask(0, 0.5, (4, 8, 64, 128)).reshape(-1, 128)
    assert len(np.unique(rows, axis=0)) == len(rows)
