"""The settings of a run: what a file in configs/ returns, checked and frozen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipelines.pipeline import FREE as FREE_OF_DATA
from data_pipelines.pipeline import DataConfig, in_order
from idefics_jax import settings
from idefics_jax.convert.parts import FORMS
from idefics_jax.errors import UserError
from idefics_jax.param_transforms import vocabulary
from idefics_jax.param_transforms.lora import LoraTarget
from idefics_jax.param_transforms.partition import Rule
from idefics_jax.sharding import RULES
from idefics_jax.stack import REMAT_POLICIES
from idefics_jax.training.optimizer import OptimizerConfig

DTYPES = ("float32", "bfloat16")
# May differ when a run is resumed: they do not change what is learnt, but for rounding, and where rows are taken in
# other parts for what dropout leaves out.
FREE_ON_RESUME = (
    "remat",
    "vision_remat",
    "rows_a_device",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "mesh",
    "sharding",
    *(f"data.{name}" for name in FREE_OF_DATA),
)
# May differ too when a run goes on that has stopped by itself.
FREE_AFTER_STOP = (
    "optimizer.learning_rate",
    "optimizer.muon_learning_rate",
    "optimizer.clip_norm",
    "max_skipped_steps",
    "diverged_after",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      seed: of the parameters and of the order of the data.
      steps: optimizer steps.
      processor: folder of the tokenizer and the image rules.
      image_rules: values that take the place of the processor's own (fields of images.ImageRules).
      init_from: folder of the weights to start from: Hugging Face's, ours, or the work directory of another run; None
        for random ones.
      init_parts: {"vision_model": folder, "text_model": folder}, either or both: pretrained parts to start from where
        there is no `init_from` (convert/parts.py); the rest is random.
      model: the sections of a Hugging Face config.json: sizes of the model that trains. Empty for those of `init_from`.
      resize_positions: whether a position table of another size is interpolated to the model's; otherwise refused.
      grow_vocabulary: how rows start that the starting weights lack: "normal" or "mean" (param_transforms.vocabulary),
        or "none" to refuse. Without `model`, the vocabulary becomes the processor's.
      init_std: (pattern, standard deviation) of random weights that deviate from the parts' own.
      dtype: of the arithmetic; trained parameters are float32 whatever this says.
      frozen_dtype: of frozen parameters.
      remat: what the backward pass keeps of the decoder, a name in stack.REMAT_POLICIES.
      vision_remat: and of what works on images, whose many short layers fill memory sooner.
      loss_chunk: positions whose logits exist at once.
      rows_a_device: the most rows that a device takes at once; what its share of a batch has more follows, and the
        gradients are summed. So one config suits slices of any size.
      partition: what trains and how: rows (pattern, "frozen") or (pattern, "trainable", factor of the learning rate,
        weight decay); a pattern matches whole paths of parameters and adapters, the first match wins.
      quantize: patterns of the module paths whose frozen kernels are held as int8.
      lora: LoRA or DoRA adapters by a name of your choice. Of two whose patterns match a kernel, the one that comes
        first in the alphabet is taken: a ConfigDict keeps no other order.
      new_rows: how many of the last vocabulary rows train, as adapters `new_rows`, beside their frozen tables.
      neftune_alpha: strength of the noise on embeddings in training; 0 for none.
      optimizer: see OptimizerConfig.
      max_skipped_steps: steps whose numbers are not finite that are skipped before the run stops; 0 stops at the first.
      diverged_after: steps that the loss must stay far above what it was before the run stops; 0 never stops it.
      data: see data_pipelines.pipeline.DataConfig.
      mesh: size of each mesh axis, -1 for what is left.
      sharding: name in sharding.RULES.
      log_every: steps between two lines of progress.
      checkpoint_every: steps between two checkpoints.
      keep_checkpoints: newest checkpoints kept; while the loss is far up, the last from before is kept beside them.
    """

    seed: int
    steps: int
    processor: str
    image_rules: Mapping[str, Any]
    init_from: str | None
    init_parts: Mapping[str, str]
    model: Mapping[str, Any]
    resize_positions: bool
    grow_vocabulary: str
    init_std: tuple[tuple[str, float], ...]
    dtype: str
    frozen_dtype: str
    remat: str
    vision_remat: str
    loss_chunk: int
    rows_a_device: int
    partition: tuple[Rule, ...]
    quantize: tuple[str, ...]
    lora: Mapping[str, LoraTarget]
    new_rows: int
    neftune_alpha: float
    optimizer: OptimizerConfig
    max_skipped_steps: int
    diverged_after: int
    data: DataConfig
    mesh: Mapping[str, int]
    sharding: str
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int

    def __post_init__(self):
        for name in ("steps", "loss_chunk", "rows_a_device", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, allowed in (
            ("dtype", DTYPES),
            ("frozen_dtype", DTYPES),
            ("remat", REMAT_POLICIES),
            ("vision_remat", REMAT_POLICIES),
            ("sharding", RULES),
            ("grow_vocabulary", ("none", *vocabulary.STARTS)),
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
        if not self.model and not self.init_from:
            raise UserError("give model (the sizes of the model), init_from (a folder of weights), or both")
        if self.init_parts and self.init_from:
            raise UserError("init_from holds every part already; give it or init_parts")
        if self.init_std and self.init_from:
            raise UserError("init_std is of random weights, and init_from leaves none; set init_std to ()")
        unknown = sorted(set(self.init_parts) - set(FORMS))
        if unknown:
            raise UserError(f"init_parts names {unknown[0]!r}; the parts are {', '.join(FORMS)}")
        for name in ("new_rows", "neftune_alpha", "max_skipped_steps", "diverged_after"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.diverged_after == 1:
            raise UserError("diverged_after is 1; a rise is told from a spike over at least 2 steps, 0 never stops")
        if any(std <= 0 for _, std in self.init_std):
            raise UserError(f"init_std holds {self.init_std}; every standard deviation must be positive")

    @classmethod
    def from_config_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Builds the settings from what a config file returns.

        Stages and sources are groups there, so that `--config.data.stages.stage2.sources.mine.paths=...` reaches
        them: stages run in the order of their names, and a source is called by its own. Rows of `partition` are tuples.

        Raises:
          UserError: see settings.build.
        """
        values = {**values, "data": in_order(values.get("data"))}
        if isinstance(values.get("partition"), (tuple, list)):
            values["partition"] = tuple(_rule(row) for row in values["partition"])
        return settings.build(cls, values, "config")


def _rule(row: Any) -> Mapping[str, Any]:
    """Names the columns of a row of `partition`; `settings.build` checks their values."""
    names = ("pattern", "state", "lr_factor", "weight_decay")
    if not isinstance(row, (tuple, list)) or len(row) != (2 if "frozen" in row else len(names)):
        raise UserError(
            f"config.partition has the row {row!r}; a row is (pattern, 'frozen') or (pattern, 'trainable', factor of "
            "the learning rate, weight decay)"
        )
    return dict(zip(names, row, strict=False))
