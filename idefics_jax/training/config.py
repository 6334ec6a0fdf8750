"""The settings of a run: what a file in configs/ returns, checked and frozen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipelines.pipeline import DataConfig
from idefics_jax import settings
from idefics_jax.errors import UserError
from idefics_jax.param_transforms.lora import LoraTarget
from idefics_jax.sharding import RULES
from idefics_jax.stack import REMAT_POLICIES
from idefics_jax.training.optimizer import OptimizerConfig

DTYPES = ("float32", "bfloat16")
# May differ when a run is resumed: they do not change what is learnt.
FREE_ON_RESUME = ("log_every", "checkpoint_every", "keep_checkpoints")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      seed: of the parameters and of the order of the data.
      steps: optimizer steps.
      processor: folder of the tokenizer and the image rules.
      init_from: folder of the weights to start from (Hugging Face's or ours), or None for random ones.
      model: the sections of a Hugging Face config.json, for random weights; empty with `init_from`.
      init_std: (pattern, standard deviation) of random weights that deviate from the parts' own.
      dtype: of the arithmetic; trained parameters are float32 whatever this says.
      frozen_dtype: of frozen parameters.
      remat: what the backward pass keeps, a name in stack.REMAT_POLICIES.
      loss_chunk: positions whose logits exist at once.
      accumulation: micro-batches a step.
      partition: (pattern, "trainable" or "frozen"), the first match wins.
      lora: adapters by a name of your choice.
      optimizer: see OptimizerConfig.
      data: see data_pipelines.pipeline.DataConfig.
      mesh: size of each mesh axis, -1 for what is left.
      sharding: name in sharding.RULES.
      log_every: steps between two lines of progress.
      checkpoint_every: steps between two checkpoints.
      keep_checkpoints: newest checkpoints kept.
    """

    seed: int
    steps: int
    processor: str
    init_from: str | None
    model: Mapping[str, Any]
    init_std: tuple[tuple[str, float], ...]
    dtype: str
    frozen_dtype: str
    remat: str
    loss_chunk: int
    accumulation: int
    partition: tuple[tuple[str, str], ...]
    lora: Mapping[str, LoraTarget]
    optimizer: OptimizerConfig
    data: DataConfig
    mesh: Mapping[str, int]
    sharding: str
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int

    def __post_init__(self):
        for name in ("steps", "loss_chunk", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, allowed in (
            ("dtype", DTYPES),
            ("frozen_dtype", DTYPES),
            ("remat", REMAT_POLICIES),
            ("sharding", RULES),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed is {self.seed}; it must lie in [0, 2**31)")
        if self.optimizer.warmup_steps > self.steps:
            raise UserError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) is more than steps ({self.steps}); "
                "lower the one or raise the other"
            )
        if self.data.shape.rows % self.accumulation:
            raise UserError(
                f"data.shape.rows ({self.data.shape.rows}) must be a multiple of accumulation ({self.accumulation})"
            )
        if bool(self.model) == bool(self.init_from):
            raise UserError(
                "give either model (sizes of a model to start at random) or init_from (a folder of weights)"
            )
        if any(std <= 0 for _, std in self.init_std):
            raise UserError(f"init_std holds {self.init_std}; every standard deviation must be positive")

    @classmethod
    def from_config_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Builds the settings from what a config file returns.

        Stages and sources are groups there, so that `--config.data.stages.stage2.sources.mine.paths=...` reaches
        them: stages run in the order of their names, and a source is called by its own.

        Raises:
          UserError: see settings.build.
        """
        return settings.build(cls, _in_order(values), "config")


def _in_order(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turns the groups of stages and sources into the tuples that DataConfig holds; what is no group stays."""
    data = values.get("data")
    stages = data.get("stages") if isinstance(data, Mapping) else None
    if not isinstance(stages, Mapping) or not all(isinstance(stage, Mapping) for stage in stages.values()):
        return dict(values)

    def named(sources: Any) -> Any:
        if not isinstance(sources, Mapping) or not all(isinstance(source, Mapping) for source in sources.values()):
            return sources
        return tuple({"name": name, **source} for name, source in sorted(sources.items()))

    ordered = tuple({**stage, "sources": named(stage.get("sources"))} for _, stage in sorted(stages.items()))
    return {**values, "data": {**data, "stages": ordered}}
