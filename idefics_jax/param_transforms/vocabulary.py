"""More vocabulary rows: what tokens need that the pretrained decoder does not know.

The rows are appended to `text_model/embed_tokens/embedding` [V, D] and to the head `text_model/lm_head/kernel` [D, V],
where it is not tied; the old ones stay as they are, to the bit. They start in one of two ways of the authors' code:
"normal", as the two tokens around images did, with a standard deviation of 1 / sqrt(D); or "mean", as
`<end_of_utterance>` did before instruction tuning, each row being the mean of the old ones.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from idefics_jax.param_transforms import paths
from idefics_jax.param_transforms.new_rows import TABLES
from idefics_jax.param_transforms.shapes import on_shapes

STARTS = ("normal", "mean")


@on_shapes
def grow(params: Mapping[str, Any], size: int, *, start: str, rng: jax.Array) -> dict[str, Any]:
    """Returns the parameters with `size` rows in each vocabulary table.

    Args:
      params: any tree that holds the tables.
      size: rows in all.
      start: how the new rows start, one of STARTS.
      rng: key of "normal".

    Raises:
      ValueError: a table has more rows than `size` already: rows in use would be lost.
    """
    flat = paths.flatten(params)
    for index, (module, name) in enumerate(TABLES.items()):
        path = f"{module}/{name}"
        if path not in flat:  # a tied head
            continue
        along = 0 if name == "embedding" else 1
        table, key = flat[path], jax.random.fold_in(rng, index)
        if table.shape[along] > size:
            raise ValueError(f"{path} has {table.shape[along]} rows; a vocabulary grows, and cannot shrink to {size}")
        count, width = size - table.shape[along], table.shape[1 - along]
        if start == "mean":
            rows = jnp.repeat(jnp.mean(table, axis=along, keepdims=True, dtype=jnp.float32), count, axis=along)
        else:
            rows = jax.random.normal(key, (count, width) if along == 0 else (width, count)) * width**-0.5
        flat[path] = jnp.concatenate([table, rows.astype(table.dtype)], axis=along)
    return paths.unflatten(flat)
