"""The optimizer of a run, from its configuration: schedule, clipping, decay masks, AdamW or Muon."""

import dataclasses
from typing import Any

import optax

from idefics_jax.param_transforms import paths

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
      weight_decay: decoupled decay.
      no_decay: patterns of parameters without decay.
      clip_norm: largest global norm of the gradient.
    """

    name: str
    learning_rate: float
    muon_learning_rate: float
    schedule: str
    warmup_steps: int
    b1: float
    b2: float
    weight_decay: float
    no_decay: tuple[str, ...]
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
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay!r}; it must be 0 or more")
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


def make_optimizer(config: OptimizerConfig, trainable: Any, steps: int) -> optax.GradientTransformation:
    """Builds the optimizer for a tree of trainable parameters (arrays or shapes).

    Raises:
      ValueError: a `no_decay` pattern that matches no trainable parameter.
    """
    flat = paths.flatten(trainable)
    spared = paths.select(config.no_decay, flat, field="optimizer.no_decay")
    decayed = paths.unflatten({path: path not in spared for path in flat})
    adam_rate = make_schedule(config, config.learning_rate, steps)
    if config.name == "adamw":
        update = optax.adamw(adam_rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed)
    else:
        update = optax.contrib.muon(
            make_schedule(config, config.muon_learning_rate, steps),
            weight_decay=config.weight_decay,
            weight_decay_mask=decayed,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=adam_rate,
            muon_weight_dimension_numbers=_matrices(trainable),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _matrices(trainable: Any) -> Any:
    """Returns Muon's reading of each leaf: the last two dims of a kernel or adapter; None for what AdamW updates.

    Embedding tables, latents and the head are not maps between hidden states, and stay with AdamW.
    """
    is_matrix = optax.contrib.MuonDimensionNumbers

    def of_leaf(path: str, leaf: Any):
        mapped = path.endswith(("kernel", "lora_A", "lora_B")) and "lm_head" not in path
        return is_matrix(leaf.ndim - 2, leaf.ndim - 1) if mapped else None

    return paths.map_paths(of_leaf, trainable)
