"""The vision encoder's position table on another grid: what a higher resolution needs before it trains.

SigLIP's 27 x 27 positions become 70 x 70 where training goes from 384 to 980 pixels. Bicubic as PyTorch's
`F.interpolate(size=..., mode="bicubic", align_corners=False)`, without antialiasing. The authors' code asks for a
scale of (70 + 0.1) / 27, which keeps the same 70 samples but moves the last of them by 1/26 of an old cell.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idefics_jax.param_transforms import paths
from idefics_jax.param_transforms.shapes import on_shapes

TABLE = "vision_model/embeddings/position_embedding/embedding"
SHARPNESS = -0.75  # of PyTorch's cubic kernel; jax.image.resize has -0.5


@on_shapes
def resize(params: Mapping[str, Any], side: int) -> dict[str, Any]:
    """Returns the parameters with a position table of `side` x `side` rows, computed in float32, in its dtype.

    Args:
      params: any tree that holds the table, [p * p, E] in reading order.
      side: rows and columns of the new table.

    Raises:
      ValueError: the table is no square.
    """
    flat = paths.flatten(params)
    table = flat[TABLE]
    old = math.isqrt(table.shape[0])
    if old**2 != table.shape[0]:
        raise ValueError(f"{TABLE} has {table.shape[0]} rows; only the square of a whole number can be resized")
    if old != side:
        flat[TABLE] = _resized(jnp.asarray(table, jnp.float32), old, side).astype(table.dtype)
    return paths.unflatten(flat)


def _resized(table: jax.Array, old: int, side: int) -> jax.Array:
    """[old * old, E] -> [side * side, E]."""
    weights = cubic_weights(old, side)
    grid = table.reshape(old, old, -1)
    grid = jnp.einsum("ro,oce->rce", weights, grid, precision="highest")
    return jnp.einsum("ro,coe->cre", weights, grid, precision="highest").reshape(side * side, -1)


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Returns float32 [new, old]: what each old sample of a line counts in each new one; rows sum to 1.

    A place beyond the edge counts for the sample at the edge.
    """
    places = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((new, old))
    for step in (-1, 0, 1, 2):
        sample = np.clip(first + step, 0, old - 1)
        np.add.at(weights, (np.arange(new), sample), _keys(np.abs(places - first - step)))
    return weights.astype(np.float32)


def _keys(distance: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) at distances below 2."""
    a, x = SHARPNESS, distance
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)
