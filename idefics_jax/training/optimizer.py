"""The optimizer of a run, from its configuration: schedule, clipping, AdamW or Muon.

Each row of the partition table has an AdamW or Muon of its own, at its own learning rate and decay.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from idefics_jax.param_transforms import paths
from idefics_jax.param_transforms.partition import Rule

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer.

    Attributes:
      name: "adamw", or "muon" for matrices with AdamW for the rest.
      learning_rate: peak rate of AdamW.
      muon_learning_rate: peak rate of Muon; read only by "muon".
      schedule: after the linear warm-up, "constant", or "linear" or "cosine" down to 0 at the last step.
      warmup_steps: length of the warm-up.
      b1, b2: decay of AdamW's moments.
      clip_norm: largest global norm of the gradient.
    """

    name: str
    learning_rate: float
    muon_learning_rate: float
    schedule: str
    warmup_steps: int
    b1: float
    b2: float
    clip_norm: float

    def __post_init__(self):
        for field, allowed in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"optimizer.{field} is {getattr(self, field)!r}; it must be one of {', '.join(allowed)}"
                )
        for field in ("learning_rate", "muon_learning_rate", "clip_norm"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"optimizer.{field} is {getattr(self, field)!r}; it must be a positive number")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"optimizer.{field} is {getattr(self, field)!r}; it must lie in [0, 1)")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps is {self.warmup_steps!r}; it must be 0 or more")


def make_schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Returns learning rate by step: a linear warm-up to `peak`, then the configured decay over the rest."""
    rest = max(1, steps - config.warmup_steps)
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, trainable: Mapping[str, Any], chosen: Mapping[str, Rule], steps: int
) -> optax.GradientTransformation:
    """Builds the optimizer of a run.

    Args:
      config: the settings.
      trainable: {"params": ..., "adapters": ...}, as arrays or shapes.
      chosen: {path: rule} from partition.choose.
      steps: length of the run.
    """
    rules = sorted({*chosen.values()}, key=lambda rule: rule.pattern)
    # Numbers, as a checkpoint's folders are named after the labels and a pattern may hold a slash.
    number = {rule.pattern: str(index) for index, rule in enumerate(rules)}
    labels = {
        part: paths.map_paths(lambda path, _: number[chosen[path].pattern], tree) for part, tree in trainable.items()
    }
    used = {*jax.tree.leaves(labels)}
    updates = {number[rule.pattern]: _update(config, rule, steps) for rule in rules if number[rule.pattern] in used}
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.partition(updates, labels))


def peak_rates(config: OptimizerConfig, trainable: Mapping[str, Any], chosen: Mapping[str, Rule]) -> dict[str, float]:
    """Returns {path: peak learning rate} of every leaf that trains."""
    flat = {path: leaf for tree in trainable.values() for path, leaf in paths.flatten(tree).items()}
    rates = {True: config.muon_learning_rate, False: config.learning_rate}
    return {
        path: chosen[path].lr_factor * rates[config.name == "muon" and _is_matrix(path, leaf)]
        for path, leaf in flat.items()
    }


def _update(config: OptimizerConfig, rule: Rule, steps: int) -> optax.GradientTransformation:
    rate = make_schedule(config, rule.lr_factor * config.learning_rate, steps)
    if config.name == "adamw":
        return optax.adamw(rate, config.b1, config.b2, weight_decay=rule.weight_decay)
    return optax.contrib.muon(
        make_schedule(config, rule.lr_factor * config.muon_learning_rate, steps),
        weight_decay=rule.weight_decay,
        adam_weight_decay=rule.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=rate,
        muon_weight_dimension_numbers=_matrices,
    )


def _is_matrix(path: str, leaf: Any) -> bool:
    """Whether Muon updates a leaf: a map between hidden states, as embedding tables, latents and the head are not."""
    return leaf.ndim >= 2 and path.endswith(("kernel", "lora_A", "lora_B")) and "lm_head" not in path


def _matrices(trainable: Any) -> Any:
    """Returns Muon's reading of each leaf, its last two dims; None for what AdamW updates."""

    def of_leaf(path: tuple, leaf: Any):
        mapped = _is_matrix("/".join(key.key for key in path), leaf)
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if mapped else None

    return jax.tree_util.tree_map_with_path(of_leaf, trainable)
