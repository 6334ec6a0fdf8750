"""The settings of a PEFT adapter, adapter_config.json: only those are read that this package knows the meaning of."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from idefics_jax.errors import UserError

# Settings of adapter_config.json that change what an adapter means and are read here; of the others, those in HARMLESS
# say nothing about it, and any that is set is refused.
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_dora", "use_rslora", "peft_type"}
READ |= {"target_modules", "trainable_token_indices", "modules_to_save"}
READ |= {"init_lora_weights"}
HARMLESS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
HARMLESS |= {"task_type", "megatron_core", "qalora_group_size", "exclude_modules", "layers_to_transform"}
HARMLESS |= {"layers_pattern", "runtime_config", "ensure_weight_tying"}
# Starts of an adapter that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ) move a part of it into the
# adapter, so that the file means nothing beside the base that it names.
STARTS_BESIDE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def read_settings(path: epath.Path) -> dict[str, Any]:
    """Reads adapter_config.json.

    Raises:
      UserError: it is not there, is not LoRA's, or says what is not known here; what and where is named.
    """
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); give a folder that PEFT saved") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds a {type(settings).__name__} and no settings; give a folder that PEFT saved")
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {settings.get('peft_type')!r}; only LORA can be read")
    if settings.get("init_lora_weights") not in STARTS_BESIDE_THE_BASE:
        raise UserError(
            f"{path}: init_lora_weights is {settings['init_lora_weights']!r}, which changes the base model too; save "
            "the adapter again with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )
    for name, value in settings.items():
        if name not in READ | HARMLESS and value not in (None, False, {}, [], "none", "megatron.core"):
            raise UserError(
                f"{path}: {name} is {value!r}, which is not supported; only plain LoRA and DoRA can be read"
            )
    for name, kind in (("r", int), ("lora_alpha", (int, float))):
        value = settings.get(name)
        if not (isinstance(value, kind) and _is_number(value) and value > 0):
            raise UserError(f"{path}: {name} is {settings.get(name)!r}; it must be a positive number")
    _check_optional(settings, path)
    return settings


def _check_optional(settings: Mapping[str, Any], path: epath.Path) -> None:
    """Raises UserError for a setting that may be left out, is there, and has a value that PEFT would not write."""
    for name in ("use_dora", "use_rslora"):
        if not isinstance(settings.get(name), bool | None):
            raise UserError(f"{path}: {name} is {settings[name]!r}; it must be true or false")
    dropout = settings.get("lora_dropout")
    if dropout is not None and not (_is_number(dropout) and 0 <= dropout < 1):
        raise UserError(f"{path}: lora_dropout is {dropout!r}; it must be a number from 0 to below 1")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name)
        if not isinstance(patterns, dict | None):
            raise UserError(f"{path}: {name} is {patterns!r}; it must give a number to each of some patterns")
        for pattern, value in (patterns or {}).items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"{path}: {name} has {pattern!r}, which is not a regular expression ({error}); correct it"
                ) from error
            if not (_is_number(value) and value > 0):
                raise UserError(f"{path}: {name} gives {pattern!r} {value!r}; it must be a positive number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def of_module(module: str, settings: Mapping[str, Any], patterns: str, otherwise: str) -> float:
    """Returns a module's rank or alpha as PEFT resolves it: by the first pattern that matches the end of its name."""
    known = settings.get(patterns) or {}
    matched = (value for pattern, value in known.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
    return next(matched, settings[otherwise])
