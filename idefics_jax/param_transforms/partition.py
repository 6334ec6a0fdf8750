"""What trains, at which learning rate, with which decay: one table of rules for parameters and adapters alike.

Adapters lie at the paths of their modules (`text_model/layers/mlp/up_proj/lora_A`), so one list of patterns speaks of
both trees. What is frozen gets neither gradient nor optimizer state.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from idefics_jax.param_transforms import new_rows, paths

TRAINABLE, FROZEN = "trainable", "frozen"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
      pattern: regular expression for the whole path of a leaf; the first row that matches decides.
      state: "trainable" or "frozen".
      lr_factor: multiplies the optimizer's learning rate.
      weight_decay: decoupled decay, multiplied with the learning rate as in PyTorch.
    """

    pattern: str
    state: str
    lr_factor: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self):
        if self.state not in (TRAINABLE, FROZEN):
            raise ValueError(
                f"partition: {self.pattern!r} asks for state {self.state!r}; it must be 'trainable' or 'frozen'"
            )
        if not (math.isfinite(self.lr_factor) and self.lr_factor > 0):
            raise ValueError(
                f"partition: the learning-rate factor of {self.pattern!r} is {self.lr_factor!r}; it must be a positive "
                "number (a frozen row needs none)"
            )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(
                f"partition: the weight decay of {self.pattern!r} is {self.weight_decay!r}; it must be 0 or more"
            )


def choose(params: Mapping[str, Any], adapters: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, Rule]:
    """Returns {path: its rule} for every leaf of both trees.

    Args:
      params: parameters, as arrays or shapes.
      adapters: adapters, as arrays or shapes; may be empty.
      rules: in order.

    Raises:
      ValueError: a pattern that matches nothing, a leaf that no pattern matches, an adapter that would be frozen, or
        new rows beside a table that would train.
    """
    flat = [*paths.flatten(params), *paths.flatten(adapters)]
    by_pattern = {rule.pattern: rule for rule in rules}
    if len(by_pattern) < len(rules):
        raise ValueError("partition: two rows have the same pattern; the second would never decide")
    picked = paths.select(by_pattern, flat, field="partition")
    missed = sorted(set(flat) - set(picked))
    if missed:
        raise ValueError(f"partition: no pattern matches {missed[0]!r} and {len(missed) - 1} more; end with a '.*' row")
    chosen = {path: by_pattern[picked[path]] for path in flat}
    idle = [path for path in paths.flatten(adapters) if chosen[path].state == FROZEN]
    if idle:
        raise ValueError(
            f"partition: the row {chosen[idle[0]].pattern!r} freezes the adapter {idle[0]!r}; put a 'trainable' row "
            "that matches it above"
        )
    for path in new_rows.tables(adapters):
        if chosen[path].state == TRAINABLE:
            raise ValueError(
                f"partition: the row {chosen[path].pattern!r} trains the whole of {path!r}, beside which new_rows are "
                "of no use; put a 'frozen' row that matches it above, or set new_rows to 0"
            )
    return chosen


def split(params: Mapping[str, Any], chosen: Mapping[str, Rule]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the trainable and the frozen part of the parameters: nested dicts that share no leaf."""
    parts: dict[str, dict[str, Any]] = {TRAINABLE: {}, FROZEN: {}}
    for path, leaf in paths.flatten(params).items():
        parts[chosen[path].state][path] = leaf
    return paths.unflatten(parts[TRAINABLE]), paths.unflatten(parts[FROZEN])


def combine(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Joins two nested dicts that share no leaf: the inverse of `split`."""
    return paths.unflatten({**paths.flatten(first), **paths.flatten(second)})


def table(
    params: Mapping[str, Any], adapters: Mapping[str, Any], chosen: Mapping[str, Rule], rates: Mapping[str, float]
) -> str:
    """Returns a line for every leaf, with totals: what the start of a run prints.

    Args:
      params: all parameters, as arrays or shapes.
      adapters: as arrays or shapes.
      chosen: from `choose`; a leaf without a rule (a quantised kernel's scale) is frozen.
      rates: {path: peak learning rate} of the leaves that train.

    Returns:
      Columns path, shape, dtype, state, peak learning rate, weight decay.
    """
    flat = {**paths.flatten(params), **paths.flatten(adapters)}
    rows = [("parameter", "shape", "dtype", "state", "lr", "decay")]
    for path, leaf in flat.items():
        shape = "x".join(map(str, leaf.shape))
        if path in rates:
            trained = (TRAINABLE, f"{rates[path]:.3g}", f"{chosen[path].weight_decay:.3g}")
        else:
            trained = (FROZEN, "", "")
        rows.append((path, shape, str(leaf.dtype), *trained))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total, training = (sum(math.prod(flat[path].shape) for path in group) for group in (flat, rates))
    return "\n".join([*lines, f"{total:,} parameters, {training:,} of them trainable"])
