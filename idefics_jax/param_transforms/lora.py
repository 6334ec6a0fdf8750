"""LoRA as a second tree beside the parameters (Hu et al. 2021; terms as in PEFT).

A kernel [.., in, out] at `a/b/kernel` gets `a/b/lora_A` [.., in, R] and `a/b/lora_B` [.., R, out]. The model reads
the tree as its `lora` collection and computes `x @ W + (x @ A) @ (scale * B)` (layers.Linear), where
scale = alpha / rank; `merge` forms `W + scale * A @ B` in float32, for export and as the tests' oracle.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from idefics_jax.param_transforms import paths


@dataclasses.dataclass(frozen=True)
class LoraTarget:
    """Adapters for the kernels whose module path matches.

    Attributes:
      pattern: regular expression for the whole module path, e.g. "text_model/layers/self_attn/[qv]_proj".
      rank: R.
      alpha: numerator of the scale.
    """

    pattern: str
    rank: int
    alpha: float

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(
                f"lora: rank is {self.rank!r} for {self.pattern!r}; it must be a whole number of at least 1"
            )
        if isinstance(self.alpha, bool) or not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"lora: alpha is {self.alpha!r} for {self.pattern!r}; it must be a positive number")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


LoraSpec = Sequence[LoraTarget]


def _targets(modules: list[str], spec: LoraSpec) -> dict[str, LoraTarget]:
    """Returns {module path: its target}; every target must be the first match of some module."""
    by_pattern = {target.pattern: target for target in spec}
    chosen = paths.select(by_pattern, modules, field="lora")
    return {module: by_pattern[pattern] for module, pattern in chosen.items()}


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    return {_module(path): leaf for path, leaf in paths.flatten(params).items() if path.endswith("/kernel")}


def init(param_shapes: Mapping[str, Any], spec: LoraSpec, rng: jax.Array) -> dict[str, Any]:
    """Makes the adapters: A normal with standard deviation 1 / rank (PEFT's "gaussian"), B zero.

    At B = 0 the adapted model is exactly the base model.

    Args:
      param_shapes: the parameters, as arrays or ShapeDtypeStructs.
      spec: targets, the first match wins.
      rng: key.

    Returns:
      Nested dict of float32 arrays.

    Raises:
      ValueError: a target that matches no kernel.
    """
    kernels = _kernels(param_shapes)
    flat: dict[str, Any] = {}
    for index, (module, target) in enumerate(sorted(_targets(list(kernels), spec).items())):
        *stacked, size_in, size_out = kernels[module].shape
        key = jax.random.fold_in(rng, index)
        flat[f"{module}/lora_A"] = jax.random.normal(key, (*stacked, size_in, target.rank)) / target.rank
        flat[f"{module}/lora_B"] = jnp.zeros((*stacked, target.rank, size_out))
    return paths.unflatten(flat)


def axes(param_axes: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the adapters' logical axes: those of their kernel, with `rank` where the rank is."""
    kernels = _kernels(param_axes)

    def of_leaf(path: str, _):
        *stacked, axis_in, axis_out = kernels[_module(path)]
        return (*stacked, axis_in, "rank") if path.endswith("lora_A") else (*stacked, "rank", axis_out)

    return paths.map_paths(of_leaf, adapters)


def scale(adapters: Mapping[str, Any], spec: LoraSpec) -> dict[str, Any]:
    """Multiplies every B by its target's alpha / rank: the form in which the model reads adapters."""
    modules = _targets(sorted({_module(path) for path in paths.flatten(adapters)}), spec)

    def scaled(path: str, leaf):
        return leaf * modules[_module(path)].scale if path.endswith("lora_B") else leaf

    return paths.map_paths(scaled, adapters)


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], spec: LoraSpec) -> dict[str, Any]:
    """Returns the parameters with `scale * A @ B` added to each adapted kernel, in float32, in the kernel's dtype.

    Raises:
      ValueError: an adapter whose kernel the parameters lack.
    """
    merged, scaled = paths.flatten(params), paths.flatten(scale(adapters, spec))
    for module in sorted({_module(path) for path in scaled}):
        kernel = merged.get(f"{module}/kernel")
        if kernel is None:
            raise ValueError(f"lora: the adapter at {module!r} has no kernel in these parameters")
        lora_a, lora_b = (jnp.asarray(scaled[f"{module}/lora_{half}"], jnp.float32) for half in "AB")
        delta = jnp.matmul(lora_a, lora_b, precision="highest")
        merged[f"{module}/kernel"] = (jnp.asarray(kernel, jnp.float32) + delta).astype(kernel.dtype)
    return paths.unflatten(merged)


def assert_used(fn: Callable[[Any], Any], adapters: Mapping[str, Any]) -> None:
    """Traces `fn(adapters)` and checks that its result depends on every adapter leaf.

    Raises:
      ValueError: an adapter that the model never reads would train nothing, silently.
    """
    flat = paths.flatten(adapters)
    jaxpr = jax.make_jaxpr(lambda leaves: fn(paths.unflatten(leaves)))(flat).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    # Dicts are flattened in the order of their sorted keys.
    unused = [path for path, is_used in zip(sorted(flat), used, strict=True) if not is_used]
    if unused:
        raise ValueError(f"lora: the model never reads {unused[0]!r} and {len(unused) - 1} more; correct the pattern")
