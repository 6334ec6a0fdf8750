"""Transforms of arrays as transforms of shapes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax


def on_shapes(transform: Callable) -> Callable:
    """Lets a transform whose positional Mappings are trees of arrays take trees of ShapeDtypeStructs as well.

    Where any of them holds one, the transform is traced, and what it would return is told in ShapeDtypeStructs.
    """

    @functools.wraps(transform)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        trees = {i: arg for i, arg in enumerate(args) if isinstance(arg, Mapping)}
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trees)):
            return transform(*args, **kwargs)
        return jax.eval_shape(
            lambda given: transform(*(given.get(i, arg) for i, arg in enumerate(args)), **kwargs), trees
        )

    return wrapped
