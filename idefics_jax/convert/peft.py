"""Adapters to and from a PEFT folder: adapter_config.json and adapter_model.safetensors, as peft 0.21 writes them.

A stack of layers is cut into PEFT's one module a layer. New vocabulary rows are PEFT's `trainable_token_indices`, and a
part that trained in full beside the adapters is one of its `modules_to_save`, as is a head with both LoRA and new rows,
merged. What PEFT has no words for is refused by
name; the merged model (`to-hf`) holds everything.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from jax.experimental import multihost_utils

from idefics_jax import processes
from idefics_jax.config import Idefics2Config
from idefics_jax.convert.hf_folder import LazyTensor, open_safetensors
from idefics_jax.convert.rules import TRANSPOSE, Leaf, leaves
from idefics_jax.convert.staging import staged
from idefics_jax.errors import UserError
from idefics_jax.param_transforms import lora, new_rows, paths, quantize

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Our leaf, PEFT's name after the module's. Both matrices are transposed, a magnitude is a vector.
LEAVES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
ROWS = "token_adapter.trainable_tokens_delta"
# Modules that PEFT can save whole, by the name it knows each by.
WHOLE_MODULES = {
    "connector/modality_projection": "modality_projection",
    "connector/perceiver_resampler": "perceiver_resampler",
    "vision_model/embeddings": "embeddings",
    "text_model/embed_tokens": "embed_tokens",
    "text_model/lm_head": "lm_head",
}
MERGE = "export the merged model with to-hf instead"
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


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a PEFT folder holds.

    Attributes:
      adapters: LoRA, DoRA and new rows, as in param_transforms.
      spec: the targets that scale them.
      params: parameters that replace the base's, {path: array}.
    """

    adapters: dict[str, Any]
    spec: tuple[lora.LoraTarget, ...]
    params: dict[str, np.ndarray]

    def merge(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a base's parameters with all of it merged in."""
        replaced = {path: leaf.astype(paths.flatten(params)[path].dtype) for path, leaf in self.params.items()}
        params = paths.unflatten({**paths.flatten(params), **replaced})
        return new_rows.merge(lora.merge(params, self.adapters, self.spec), self.adapters)


def save_adapter(
    folder: epath.PathLike,
    adapters: Mapping[str, Any],
    spec: lora.LoraSpec,
    trained: Mapping[str, Any],
    params: Mapping[str, Any],
    config: Idefics2Config,
    *,
    base: str | None,
) -> None:
    """Writes a PEFT folder, whole or not at all.

    Args:
      folder: in place of what is there.
      adapters: adapters, unscaled.
      spec: their targets. Where dropouts differ the largest is written; it matters to further training alone.
      trained: parameters that trained beside them, nested.
      params: all parameters, nested: a module of which some trained is saved whole, its int8 kernels multiplied out.
      config: the model.
      base: path or name of the base model, for `base_model_name_or_path`.

    Raises:
      UserError: PEFT cannot say this; nothing is written.
    """
    chosen = lora.targets(lora.adapted_modules(adapters), spec) if lora.adapted_modules(adapters) else {}
    adapters, trained, params = _with_whole_tables(adapters, chosen, trained, params)
    chosen = {module: chosen[module] for module in lora.adapted_modules(adapters)}
    if not chosen:
        raise UserError(f"there are no LoRA adapters, which a PEFT folder needs; {MERGE}")
    modules = _whole_modules(trained, adapters)
    settings = _settings(chosen, adapters, config)
    settings |= {"base_model_name_or_path": base, "modules_to_save": [WHOLE_MODULES[name] for name in modules] or None}
    tensors = {PREFIX + name: array for name, array in _tensors(processes.fetch(adapters), config)}
    inside = tuple(f"{name}/" for name in modules)
    whole = {path: leaf for path, leaf in paths.flatten(params).items() if path.startswith(inside)}
    whole = paths.flatten(quantize.dequantize(processes.fetch(paths.unflatten(whole)), jnp.float32))
    for leaf in leaves(config):
        if leaf.rule.ours in whole:
            tensors |= {PREFIX + n: x for n, x in _layers(leaf, whole[leaf.rule.ours], leaf.rule.op)}
    with staged(folder, replace=True) as aside:
        if jax.process_index() == 0:
            (aside / WEIGHTS).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
            (aside / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _with_whole_tables(
    adapters: Mapping[str, Any], chosen: Mapping[str, lora.LoraTarget], trained: Mapping[str, Any], params: Mapping
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns adapters, trained and params with each table that has LoRA and new rows merged, as if trained in full.

    PEFT knows one or the other of a module.
    """
    flat, trained, params = paths.flatten(adapters), paths.flatten(trained), paths.flatten(params)
    for module in new_rows.TABLES:
        if not {f"{module}/lora_A", f"{module}/{new_rows.NAME}"} <= set(flat):
            continue
        own = paths.unflatten({path: flat.pop(path) for path in list(flat) if paths.parent(path) == module})
        table = paths.unflatten({path: params.pop(path) for path in list(params) if paths.parent(path) == module})
        table = jax.tree.map(lambda x: x.astype(jnp.float32), quantize.dequantize(table, jnp.float32))
        target = dataclasses.replace(chosen[module], pattern=re.escape(module))
        merged = paths.flatten(new_rows.merge(lora.merge(table, own, (target,)), own))
        trained, params = trained | merged, params | merged
    return paths.unflatten(flat), paths.unflatten(trained), paths.unflatten(params)


def about(folder: epath.PathLike) -> str:
    """Returns what to tell of a folder that `save_adapter` wrote: the vocabulary that its base must have."""
    indices = _read_settings(epath.Path(folder) / CONFIG)["trainable_token_indices"]
    if indices is None:
        return f"wrote {folder}"
    size = 1 + max(max(rows) for rows in indices.values())
    return (
        f"wrote {folder}; its base must have {size} vocabulary rows: where it has fewer, call "
        f"model.resize_token_embeddings({size}) before peft loads the adapter"
    )


def _settings(chosen: Mapping[str, lora.LoraTarget], adapters: Mapping[str, Any], config: Idefics2Config) -> dict:
    """Returns adapter_config.json: the commonest rank and alpha, and patterns for the modules that deviate."""
    rules = {paths.parent(leaf.rule.ours): leaf.rule for leaf in leaves(config) if leaf.rule.ours.endswith("/kernel")}
    for module in chosen:
        if rules[module].op is not TRANSPOSE:
            raise UserError(f"the adapter at {module!r} is on a convolution, where PEFT's have another form; {MERGE}")
    if len({target.dora for target in chosen.values()}) > 1:
        raise UserError(f"some adapters are DoRA and some are not, PEFT has one switch for all; {MERGE}")
    patterns = {m: re.escape(rules[m].hf.removesuffix(".weight")).replace(r"\{\}", r"\d+") for m in chosen}
    rank = collections.Counter(target.rank for target in chosen.values()).most_common(1)[0][0]
    alpha = collections.Counter(target.alpha for target in chosen.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {patterns[m]: target.rank for m, target in chosen.items() if target.rank != rank},
        "alpha_pattern": {patterns[m]: target.alpha for m, target in chosen.items() if target.alpha != alpha},
        "lora_dropout": max(target.dropout for target in chosen.values()),
        "use_dora": any(target.dora for target in chosen.values()),
        "target_modules": "|".join(patterns.values()),
        "trainable_token_indices": _row_indices(adapters, config),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _row_indices(adapters: Mapping[str, Any], config: Idefics2Config) -> dict[str, list[int]] | None:
    flat, size = paths.flatten(adapters), config.text_config.vocab_size
    indices = {}
    for module, name in new_rows.TABLES.items():
        rows = flat.get(f"{module}/{new_rows.NAME}")
        if rows is None:
            continue
        count = rows.shape[0 if name == "embedding" else 1]
        indices[module.rpartition("/")[2]] = list(range(size - count, size))
    return indices or None


def _whole_modules(trained: Mapping[str, Any], adapters: Mapping[str, Any]) -> list[str]:
    """Returns the modules that PEFT must save whole for the parameters that trained."""
    modules = []
    for path in paths.flatten(trained):
        module = next((name for name in WHOLE_MODULES if path.startswith(f"{name}/")), None)
        if module is None:
            raise UserError(f"{path!r} trained beside the adapters and lies in no module that PEFT can save; {MERGE}")
        if any(adapted.startswith(module) for adapted in paths.flatten(adapters)):
            raise UserError(f"{path!r} trained in full inside {module!r}, which also has adapters; {MERGE}")
        modules.append(module)
    return sorted(set(modules))


def _tensors(adapters: Mapping[str, Any], config: Idefics2Config) -> Iterator[tuple[str, np.ndarray]]:
    """Yields PEFT's (name without prefix, float32 array) of every adapter leaf."""
    flat = paths.flatten(adapters)
    for leaf in leaves(config):
        module = paths.parent(leaf.rule.ours)
        for ours, theirs in LEAVES.items():
            if f"{module}/{ours}" in flat and leaf.rule.ours.endswith("/kernel"):
                for name, array in _layers(leaf, flat[f"{module}/{ours}"], TRANSPOSE):
                    yield name.removesuffix("weight") + theirs, array
        if module in new_rows.TABLES and f"{module}/{new_rows.NAME}" in flat:
            for name, array in _layers(leaf, flat[f"{module}/{new_rows.NAME}"], leaf.rule.op):
                yield name.removesuffix("weight") + ROWS, array


def _layers(leaf: Leaf, value: Any, op: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the layers of a leaf's value under the leaf's Hugging Face names, in float32."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    value = np.asarray(value, np.float32)
    for index, name in enumerate(leaf.names):
        yield name, np.ascontiguousarray(op.to_hf(value[index] if leaf.rule.stacked else value))


def load_adapter(folder: epath.PathLike, config: Idefics2Config) -> Adapter:
    """Reads a PEFT folder.

    Args:
      folder: adapter_config.json and adapter_model.safetensors; a pickle is never opened.
      config: the model it belongs to. Layers without an adapter get one that adds nothing.

    Raises:
      UserError: the folder is not there, is not LoRA as it is known here, or does not fit the model; what is wrong is
        named.
    """
    folder = epath.Path(folder)
    settings = _read_settings(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{folder} has no {WEIGHTS}; save the adapter with safetensors (pickles are not read)")
    tensors = {name.removeprefix(PREFIX): x for name, x in open_safetensors(folder / WEIGHTS).items()}
    used: set[str] = set()
    flat: dict[str, np.ndarray] = {}
    params: dict[str, np.ndarray] = {}
    spec = []
    for leaf in leaves(config):
        module = paths.parent(leaf.rule.ours)
        if leaf.rule.ours.endswith("/kernel") and leaf.rule.op is TRANSPOSE:
            found = _read_module(leaf, tensors, settings, used)
            if found is not None:
                flat |= {f"{module}/{name}": array for name, array in found[0].items()}
                spec.append(dataclasses.replace(found[1], pattern=re.escape(module)))
        if module in new_rows.TABLES:
            flat |= _read_rows(leaf, tensors, settings, config, used)
        # Of a head that it adapts peft saves what lies under the adapter, too.
        for names in (leaf.names, [name.removesuffix("weight") + "base_layer.weight" for name in leaf.names]):
            if set(names) <= set(tensors):
                layers = [leaf.rule.op.to_ours(_read(tensors, name, leaf.hf_shape, used)) for name in names]
                params[leaf.rule.ours] = np.stack(layers) if leaf.rule.stacked else layers[0]
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise UserError(
            f"{folder / WEIGHTS} has {len(unknown)} tensors that belong to no module of this model, or to part of one: "
            f"{', '.join(unknown[:5])}; give the base model it was trained on"
        )
    if not flat:
        raise UserError(f"{folder / WEIGHTS} holds no adapter of this model; give the base model it was trained on")
    return Adapter(paths.unflatten(flat), tuple(spec), params)


def _read_settings(path: epath.Path) -> dict[str, Any]:
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


def _read_module(
    leaf: Leaf, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], used: set[str]
) -> tuple[dict[str, np.ndarray], lora.LoraTarget] | None:
    """Reads a family's adapters, stacked over its layers; None if it has none."""
    modules = [name.removesuffix(".weight") for name in leaf.names]
    adapted = [module for module in modules if f"{module}.{LEAVES['lora_A']}" in tensors]
    if not adapted:
        return None
    dora = bool(settings.get("use_dora"))
    if dora and len(adapted) < len(modules):
        raise UserError(f"{leaf.rule.hf}: only {len(adapted)} of {len(modules)} layers have a DoRA adapter; all must")
    size_out, size_in = leaf.hf_shape
    ranks = {tensors[f"{module}.{LEAVES['lora_A']}"].shape[0] for module in adapted}
    alphas = {float(_of_module(module, settings, "alpha_pattern", "lora_alpha")) for module in adapted}
    told = {_of_module(module, settings, "rank_pattern", "r") for module in adapted}
    if told != ranks:
        raise UserError(
            f"{leaf.rule.hf}: the adapter's rank is {sorted(ranks)} where {CONFIG} says {sorted(told)}; the two files "
            "are not of one adapter"
        )
    if len(ranks) > 1 or len(alphas) > 1:
        raise UserError(f"{leaf.rule.hf}: ranks {sorted(ranks)} and alphas {sorted(alphas)} differ between layers")
    (rank,), (alpha,) = ranks, alphas
    shapes = {"lora_A": (rank, size_in), "lora_B": (size_out, rank)} | ({"lora_magnitude": (size_out,)} if dora else {})
    stacks = {}
    for ours, shape in shapes.items():
        layers = [
            _read(tensors, f"{module}.{LEAVES[ours]}", shape, used).T if module in adapted else np.zeros(shape[::-1])
            for module in modules
        ]
        stacks[ours] = np.asarray(np.stack(layers) if leaf.rule.stacked else layers[0], np.float32)
    alpha *= math.sqrt(rank) if settings.get("use_rslora") else 1.0
    return stacks, lora.LoraTarget("", rank, alpha, float(settings.get("lora_dropout") or 0.0), dora)


def _of_module(module: str, settings: Mapping[str, Any], patterns: str, otherwise: str) -> float:
    """Returns a module's rank or alpha as PEFT resolves it: by the first pattern that matches the end of its name."""
    known = settings.get(patterns) or {}
    matched = (value for pattern, value in known.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
    return next(matched, settings[otherwise])


def _read_rows(
    leaf: Leaf, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], config: Idefics2Config, used: set[str]
) -> dict[str, np.ndarray]:
    name = leaf.names[0].removesuffix("weight") + ROWS
    if name not in tensors:
        return {}
    module, size = paths.parent(leaf.rule.ours), config.text_config.vocab_size
    rows = _read(tensors, name, (tensors[name].shape[0], leaf.hf_shape[1]), used)
    wanted = list(range(size - rows.shape[0], size))
    indices = settings.get("trainable_token_indices")
    indices = indices.get(module.rpartition("/")[2]) if isinstance(indices, dict) else indices
    if (
        isinstance(indices, list)
        and all(isinstance(index, int) for index in indices)
        and max(indices, default=0) >= size
    ):
        grown = 1 + max(indices)
        raise UserError(
            f"the adapter trains the rows {indices[0]} to {indices[-1]} of {module}, and the base has {size}; grow it: "
            f"call transformers' model.resize_token_embeddings({grown}), and give the folder that it saves"
        )
    if indices != wanted:
        raise UserError(f"trainable_token_indices of {module} are {indices}; only the last rows, {wanted}, can be read")
    return {f"{module}/{new_rows.NAME}": np.asarray(leaf.rule.op.to_ours(rows), np.float32)}


def _read(tensors: Mapping[str, LazyTensor], name: str, shape: Iterable[int], used: set[str]) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"the adapter lacks {name}; it is not whole, save it again")
    if tensors[name].shape != tuple(shape):
        raise UserError(f"the adapter's {name} is {list(tensors[name].shape)} and should be {list(shape)}")
    used.add(name)
    return np.asarray(tensors[name])
