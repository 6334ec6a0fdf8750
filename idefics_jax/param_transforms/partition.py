"""Which parameters train and which are frozen: one tree into two that share no leaf."""

from collections.abc import Mapping, Sequence
from typing import Any

from idefics_jax.param_transforms import paths

TRAINABLE, FROZEN = "trainable", "frozen"


def partition(params: Mapping[str, Any], rules: Sequence[tuple[str, str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree by the first rule whose pattern matches a leaf's whole path.

    Args:
      params: nested dict.
      rules: (regular expression, "trainable" or "frozen"), in order.

    Returns:
      The trainable and the frozen part, each a nested dict.

    Raises:
      ValueError: a pattern that matches nothing, a leaf that no pattern matches, or an unknown state.
    """
    states = dict(rules)
    for pattern, state in rules:
        if state not in (TRAINABLE, FROZEN):
            raise ValueError(f"partition: {pattern!r} asks for state {state!r}; it must be 'trainable' or 'frozen'")
    flat = paths.flatten(params)
    chosen = paths.select([pattern for pattern, _ in rules], flat, field="partition")
    missed = sorted(set(flat) - set(chosen))
    if missed:
        raise ValueError(
            f"partition: no pattern matches {missed[0]!r} and {len(missed) - 1} more; end with a '.*' rule"
        )
    parts: dict[str, dict[str, Any]] = {TRAINABLE: {}, FROZEN: {}}
    for path, leaf in flat.items():
        parts[states[chosen[path]]][path] = leaf
    return paths.unflatten(parts[TRAINABLE]), paths.unflatten(parts[FROZEN])


def combine(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `partition`."""
    return paths.unflatten({**paths.flatten(trainable), **paths.flatten(frozen)})


def table(params: Mapping[str, Any], trainable: Mapping[str, Any]) -> str:
    """Returns path, shape, dtype and state of every leaf, one a line, with totals: printed at the start of a run."""
    trains, flat = paths.flatten(trainable), paths.flatten(params)
    width = max(len(path) for path in flat)
    lines = []
    for path, leaf in flat.items():
        state = TRAINABLE if path in trains else FROZEN
        lines.append(f"{path:<{width}}  {'x'.join(map(str, leaf.shape)):>16}  {leaf.dtype!s:>8}  {state}")
    total = sum(leaf.size for leaf in flat.values())
    training = sum(flat[path].size for path in trains if path in flat)
    return "\n".join([*lines, f"{total:,} parameters, {training:,} of them trainable"])
