"""Frozen kernels as int8 with a scale for each output, so that a large base fits beside its adapters.

A kernel [.., in, out] becomes int8, and `kernel_scale` float32 [.., out] is put beside it; layers.Linear multiplies by
the scale after the product. Adapters lie on the side path as on any kernel (QLoRA's idea, Dettmers et al. 2023, at
eight bits). Each weight is off by at most half a step: its column's largest, divided by 254.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from idefics_jax.param_transforms import paths
from idefics_jax.param_transforms.shapes import on_shapes

STEPS = 127  # symmetric: -128 is not used


def check_frozen(trained: Mapping[str, Any], frozen: Mapping[str, Any], patterns: Sequence[str]) -> None:
    """Refuses patterns that speak of kernels that train: int8 has no gradient.

    Args:
      trained: the parameters that train, as arrays or shapes.
      frozen: the others.
      patterns: as for `quantize`.

    Raises:
      ValueError: a pattern that matches a kernel that trains, or no kernel at all.
    """
    modules = [{paths.parent(p) for p in paths.flatten(tree) if p.endswith("/kernel")} for tree in (trained, frozen)]
    chosen = paths.select(patterns, sorted(modules[0] | modules[1]), field="quantize")
    wrong = [module for module in chosen if module in modules[0]]
    if wrong:
        raise ValueError(
            f"quantize: {chosen[wrong[0]]!r} matches {wrong[0]!r}, whose kernel trains; freeze it in partition, or "
            "narrow the pattern to kernels that are frozen"
        )


@on_shapes
def quantize(params: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """Quantises the kernels whose module path matches a pattern.

    Raises:
      ValueError: a pattern that matches no kernel.
    """
    flat = paths.flatten(params)
    modules = [paths.parent(path) for path in flat if path.endswith("/kernel")]
    for module in paths.select(patterns, modules, field="quantize"):
        kernel = jnp.asarray(flat[f"{module}/kernel"], jnp.float32)
        scale = jnp.max(jnp.abs(kernel), axis=-2) / STEPS
        steps = kernel / jnp.where(scale == 0, 1.0, scale)[..., None, :]
        flat[f"{module}/kernel"] = jnp.round(steps).astype(jnp.int8)
        flat[f"{module}/kernel_scale"] = scale
    return paths.unflatten(flat)


@on_shapes
def dequantize(params: Mapping[str, Any], dtype: jnp.dtype) -> dict[str, Any]:
    """Returns the parameters with every int8 kernel multiplied out in float32, in `dtype`."""
    flat = paths.flatten(params)
    for path in [path for path in flat if path.endswith("/kernel_scale")]:
        kernel, scale = flat[f"{paths.parent(path)}/kernel"], flat.pop(path)
        flat[f"{paths.parent(path)}/kernel"] = (kernel.astype(jnp.float32) * scale[..., None, :]).astype(dtype)
    return paths.unflatten(flat)


def axes(param_axes: Mapping[str, Any], quantized: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the logical axes of a quantised tree: a scale lies as the outputs of its kernel."""
    flat = paths.flatten(param_axes)

    def of_leaf(path: str, _):
        if not path.endswith("/kernel_scale"):
            return flat[path]
        *stacked, _, axis_out = flat[f"{paths.parent(path)}/kernel"]
        return (*stacked, axis_out)

    return paths.map_paths(of_leaf, quantized)


@on_shapes
def cast(frozen: Mapping[str, Any], dtype: jnp.dtype) -> dict[str, Any]:
    """Casts frozen parameters, except quantised kernels and their scales."""
    flat = paths.flatten(frozen)

    def of_leaf(path: str, leaf):
        kept = path.endswith("/kernel_scale") or f"{paths.parent(path)}/kernel_scale" in flat and leaf.dtype == jnp.int8
        return leaf if kept else leaf.astype(dtype)

    return paths.map_paths(of_leaf, frozen)
