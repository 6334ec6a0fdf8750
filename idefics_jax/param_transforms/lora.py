"""LoRA and DoRA as a second tree beside the parameters (Hu et al. 2021, Liu et al. 2024; terms as in PEFT).

A kernel [.., in, out] at `a/b/kernel` gets `a/b/lora_A` [.., in, R] and `a/b/lora_B` [.., R, out], and for DoRA
`a/b/lora_magnitude` [.., out]. The model reads the tree, its B scaled by alpha / rank, as its `adapters` collection
(side_path.py). `merge` forms the adapted kernel in float32, for export and as the tests' oracle.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from idefics_jax.param_transforms import paths
from idefics_jax.param_transforms.shapes import on_shapes

INITS = ("gaussian", "kaiming")
LEAVES = ("lora_A", "lora_B", "lora_magnitude")


@dataclasses.dataclass(frozen=True)
class LoraTarget:
    """Adapters for the kernels whose module path matches.

    Attributes:
      pattern: regular expression for the whole module path, e.g. "text_model/layers/self_attn/[qv]_proj".
      rank: R.
      alpha: numerator of the scale.
      dropout: share of the side path's input that training drops.
      dora: whether the magnitude of each output is learnt apart from its direction.
      init: how A starts: "gaussian", normal with standard deviation 1 / rank (PEFT's "gaussian"), or "kaiming",
        uniform within ±1 / sqrt(in) (PEFT's default). B starts at zero, so the adapted model is the base model.
    """

    pattern: str
    rank: int
    alpha: float
    dropout: float = 0.0
    dora: bool = False
    init: str = "gaussian"

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(
                f"lora: rank is {self.rank!r} for {self.pattern!r}; it must be a whole number of at least 1"
            )
        if isinstance(self.alpha, bool) or not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"lora: alpha is {self.alpha!r} for {self.pattern!r}; it must be a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout is {self.dropout!r} for {self.pattern!r}; it must lie in [0, 1)")
        if self.init not in INITS:
            raise ValueError(f"lora: init is {self.init!r} for {self.pattern!r}; it must be one of {', '.join(INITS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


LoraSpec = Sequence[LoraTarget]


def targets(modules: Sequence[str], spec: LoraSpec) -> dict[str, LoraTarget]:
    """Returns {module path: its target}, the first that matches.

    Raises:
      ValueError: a target that is the first match of no module, or two targets with the same pattern.
    """
    by_pattern = {target.pattern: target for target in spec}
    if len(by_pattern) < len(spec):
        raise ValueError("lora: two targets have the same pattern; the second would never decide, so remove one")
    chosen = paths.select(by_pattern, modules, field="lora")
    return {module: by_pattern[pattern] for module, pattern in chosen.items()}


def adapted_modules(adapters: Mapping[str, Any]) -> list[str]:
    """Returns the module paths that have a LoRA adapter, sorted."""
    return sorted(paths.parent(path) for path in paths.flatten(adapters) if path.endswith("/lora_A"))


def _kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    return {paths.parent(path): leaf for path, leaf in paths.flatten(params).items() if path.endswith("/kernel")}


@on_shapes
def init(params: Mapping[str, Any], spec: LoraSpec, rng: jax.Array) -> dict[str, Any]:
    """Makes the adapters; the adapted model starts as the base model.

    Args:
      params: the parameters. Only shapes are read, except of the kernels under DoRA, whose magnitudes start as the
        norms of their columns.
      spec: targets, the first match wins.
      rng: key.

    Returns:
      Nested dict of float32 arrays.

    Raises:
      ValueError: a target that matches no kernel.
    """
    kernels, flat = _kernels(params), {}
    for index, (module, target) in enumerate(sorted(targets(list(kernels), spec).items())):
        *stacked, size_in, size_out = kernels[module].shape
        shape, key = (*stacked, size_in, target.rank), jax.random.fold_in(rng, index)
        if target.init == "gaussian":
            flat[f"{module}/lora_A"] = jax.random.normal(key, shape) / target.rank
        else:
            flat[f"{module}/lora_A"] = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / math.sqrt(size_in)
        flat[f"{module}/lora_B"] = jnp.zeros((*stacked, target.rank, size_out))
        if target.dora:
            flat[f"{module}/lora_magnitude"] = _norms(jnp.asarray(kernels[module], jnp.float32))
    return paths.unflatten(flat)


def axes(param_axes: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the adapters' logical axes: those of their kernel, with `rank` where the rank is."""
    kernels = _kernels(param_axes)

    def of_leaf(path: str, _):
        *stacked, axis_in, axis_out = kernels[paths.parent(path)]
        return {
            "lora_A": (*stacked, axis_in, "rank"),
            "lora_B": (*stacked, "rank", axis_out),
            "lora_magnitude": (*stacked, axis_out),
        }[paths.name(path)]

    return paths.map_paths(of_leaf, adapters)


@on_shapes
def scale(adapters: Mapping[str, Any], spec: LoraSpec) -> dict[str, Any]:
    """Multiplies every B by its target's alpha / rank: the form in which the model reads adapters."""
    chosen = targets(adapted_modules(adapters), spec)

    def scaled(path: str, leaf):
        return leaf * chosen[paths.parent(path)].scale if path.endswith("/lora_B") else leaf

    return paths.map_paths(scaled, adapters)


def with_dropout(adapters: Mapping[str, Any], spec: LoraSpec) -> dict[str, Any]:
    """Adds to each adapter with dropout its rate, `lora_dropout` [..], which the model heeds where it gets a key.

    A module whose adapted children all have the same rate gets it too: only then may they share a mask.
    """
    flat, children = paths.flatten(adapters), collections.defaultdict(list)
    for module, target in targets(adapted_modules(adapters), spec).items():
        children[paths.parent(module)].append(target.dropout)
        if target.dropout:
            rate = jnp.full(flat[f"{module}/lora_A"].shape[:-2], target.dropout)
            flat[f"{module}/lora_dropout"] = flat[f"{paths.parent(module)}/lora_dropout"] = rate
    for parent, rates in children.items():
        if len(set(rates)) > 1:
            del flat[f"{parent}/lora_dropout"]
    return paths.unflatten(flat)


@on_shapes
def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], spec: LoraSpec) -> dict[str, Any]:
    """Returns the parameters with each adapted kernel in place of its base, computed in float32, in its dtype.

    Raises:
      ValueError: an adapter whose kernel the parameters lack.
    """

    def merged(module: str, kernel: jax.Array, delta: jax.Array, magnitude: jax.Array | None) -> jax.Array:
        kernel = kernel + delta
        return kernel if magnitude is None else kernel * (magnitude / _norms(kernel))[..., None, :]

    return _for_each_kernel(merged, params, adapters, spec)


@on_shapes
def unmerge(
    params: Mapping[str, Any], adapters: Mapping[str, Any], spec: LoraSpec, norms: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """Returns the base that `merge` made `params` of, to within the rounding of the kernels' dtype.

    Args:
      params: merged parameters; float32 ones, unless what a shorter dtype rounded away may be lost.
      adapters: those that were merged.
      spec: their targets.
      norms: for modules under DoRA, what `column_norms` gave before the merge: merging divides by them, and nothing
        in its result tells them.

    Raises:
      ValueError: an adapter whose kernel the parameters lack, or a DoRA module without its norms.
    """

    def unmerged(module: str, kernel: jax.Array, delta: jax.Array, magnitude: jax.Array | None) -> jax.Array:
        if magnitude is not None:
            if module not in norms:
                raise ValueError(f"lora: unmerging {module!r} under DoRA needs its column_norms from before the merge")
            kernel = kernel * (norms[module] / magnitude)[..., None, :]
        return kernel - delta

    return _for_each_kernel(unmerged, params, adapters, spec)


@on_shapes
def column_norms(params: Mapping[str, Any], adapters: Mapping[str, Any], spec: LoraSpec) -> dict[str, jax.Array]:
    """Returns {module path: norms of the columns of W + scale * A @ B, float32 [.., out]} of the adapted modules."""
    norms: dict[str, jax.Array] = {}

    def note(module: str, kernel: jax.Array, delta: jax.Array, _: jax.Array | None) -> jax.Array:
        norms[module] = _norms(kernel + delta)
        return kernel

    _for_each_kernel(note, params, adapters, spec)
    return norms


def _for_each_kernel(fn: Callable, params: Mapping[str, Any], adapters: Mapping[str, Any], spec: LoraSpec):
    """Replaces each adapted kernel by `fn(module, kernel, scale * A @ B, magnitude or None)`, all in float32."""
    flat, scaled = paths.flatten(params), paths.flatten(scale(adapters, spec))
    for module in adapted_modules(adapters):
        kernel = flat.get(f"{module}/kernel")
        if kernel is None:
            raise ValueError(f"lora: the adapter at {module!r} has no kernel in these parameters")
        lora_a, lora_b = (jnp.asarray(scaled[f"{module}/{name}"], jnp.float32) for name in ("lora_A", "lora_B"))
        delta = jnp.matmul(lora_a, lora_b, precision="highest")
        magnitude = scaled.get(f"{module}/lora_magnitude")
        flat[f"{module}/kernel"] = fn(module, jnp.asarray(kernel, jnp.float32), delta, magnitude).astype(kernel.dtype)
    return paths.unflatten(flat)


def _norms(kernel: jax.Array) -> jax.Array:
    """[.., in, out] -> norms of the columns [.., out]."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=-2))


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
