"""New vocabulary rows as adapters: they train while every other row of the tables stays as it is, to the bit.

The last n ids' rows lie beside the parameters as `text_model/embed_tokens/new_rows` [n, D] and, for a head of its own,
`text_model/lm_head/new_rows` [D, n]; the model reads them in place of the tables' own (layers.py), so no gradient or
optimizer state of a whole table exists.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from idefics_jax.param_transforms import paths
from idefics_jax.param_transforms.shapes import on_shapes

NAME = "new_rows"
TABLES = {"text_model/embed_tokens": "embedding", "text_model/lm_head": "kernel"}


@on_shapes
def init(params: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Returns float32 copies of the last `count` rows, as adapters.

    Raises:
      ValueError: the vocabulary has fewer rows.
    """
    flat, rows = paths.flatten(params), {}
    for module, name in TABLES.items():
        table = flat.get(f"{module}/{name}")
        if table is None:  # a tied head
            continue
        size = table.shape[0 if name == "embedding" else 1]
        if count > size:
            raise ValueError(f"new_rows is {count}, but the vocabulary has only {size} rows")
        last = table[size - count :] if name == "embedding" else table[:, size - count :]
        rows[f"{module}/{NAME}"] = jnp.asarray(last, jnp.float32)
    return paths.unflatten(rows)


def tables(adapters: Mapping[str, Any]) -> list[str]:
    """Returns the paths of the tables whose last rows lie among the adapters."""
    modules = [paths.parent(path) for path in paths.flatten(adapters) if paths.name(path) == NAME]
    return [f"{module}/{TABLES[module]}" for module in modules]


def axes(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rows' logical axes; there are too few of them to be cut along the vocabulary."""
    return paths.map_paths(
        lambda path, _: (None, "embed") if path.startswith("text_model/embed_tokens") else ("embed", None), adapters
    )


@on_shapes
def merge(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with the new rows in their tables, in the tables' dtypes."""
    flat = paths.flatten(params)
    for path, rows in paths.flatten(adapters).items():
        if paths.name(path) != NAME:
            continue
        module = paths.parent(path)
        target = f"{module}/{TABLES[module]}"
        table, rows = flat[target], rows.astype(flat[target].dtype)
        along = 0 if TABLES[module] == "embedding" else 1
        kept = table[: -rows.shape[0]] if along == 0 else table[:, : -rows.shape[1]]
        flat[target] = jnp.concatenate([kept, rows], axis=along)
    return paths.unflatten(flat)
