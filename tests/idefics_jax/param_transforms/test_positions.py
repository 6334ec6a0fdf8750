"""Position tables are interpolated as PyTorch interpolates them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from idefics_jax.param_transforms import positions


def tree(table):
    return {"vision_model": {"embeddings": {"position_embedding": {"embedding": table}, "patch_embedding": 1.0}}}


def resized(table, side):
    return positions.resize(tree(table), side)["vision_model"]["embeddings"]["position_embedding"]["embedding"]


def by_torch(table, old, **to):
    """In float64: in float32 PyTorch's own places are off by rounding, to 3e-5 of a value where a table is long."""
    grid = torch.from_numpy(table).double().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, mode="bicubic", align_corners=False, **to)
    return grid.permute(0, 2, 3, 1).reshape(-1, table.shape[1]).numpy()


@pytest.mark.parametrize(("old", "side"), [(27, 70), (70, 27), (4, 8), (2, 7), (1, 3)])
def test_a_table_is_resized_as_by_torch(old, side):
    table = np.random.default_rng(old).standard_normal((old * old, 5), np.float32)
    np.testing.assert_allclose(resized(table, side), by_torch(table, old, size=(side, side)), atol=2e-6)


def test_the_authors_scale_samples_within_a_twentieth_of_a_cell_of_ours():
    """A ramp across the columns shows where a sample lies; edges clamp."""
    ramp = np.tile(np.arange(27, dtype=np.float32), 27)[:, None]
    scale = (70 + 0.1) / 27
    theirs = by_torch(ramp, 27, scale_factor=(scale, scale))
    assert theirs.shape == (4900, 1)
    assert 0.01 < np.abs(resized(ramp, 70) - theirs).max() < 0.05


def test_the_dtype_stays_and_nothing_else_changes():
    table = np.random.default_rng(0).standard_normal((9, 3), np.float32)
    params = positions.resize(tree(jnp.asarray(table, jnp.bfloat16)), 5)["vision_model"]["embeddings"]
    assert params["position_embedding"]["embedding"].dtype == jnp.bfloat16
    assert params["patch_embedding"] == 1.0


def test_the_same_side_changes_no_bit():
    table = np.random.default_rng(0).standard_normal((9, 3), np.float32)
    assert resized(table, 3) is table


def test_a_table_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match="has 10 rows; only the square"):
        resized(np.zeros((10, 3), np.float32), 5)
