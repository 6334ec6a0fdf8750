"""Adapters to and from a PEFT folder: adapter_config.json and adapter_model.safetensors, as peft 0.21 writes them.

A stack of layers is cut into PEFT's one module a layer. New vocabulary rows are PEFT's `trainable_token_indices`, and a
part that trained in full beside the adapters is one of its `modules_to_save`, as is a head with both LoRA and new rows,
merged. LoRA beside DoRA, for which PEFT has one switch, is written as DoRA whose magnitudes change nothing. What PEFT
has no words for is refused by name; the merged model (`to-hf`) holds everything.

What is read may differ from layer to layer, and train any rows of the vocabulary.
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
from idefics_jax.convert.peft_settings import of_module, read_settings
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


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a PEFT folder holds.

    Attributes:
      adapters: LoRA, DoRA and the last rows of the vocabulary, as in param_transforms.
      spec: the targets that scale them.
      params: parameters that replace the base's, {path: array}.
      left_alone: {module path: which of its layers, bool [L]} of DoRA on some layers alone. Their magnitudes are not
        known without the base: they are its own norms.
      rows: {module path: (ids, their rows in Hugging Face's layout)} of vocabulary rows that are not the last.
    """

    adapters: dict[str, Any]
    spec: tuple[lora.LoraTarget, ...]
    params: dict[str, np.ndarray]
    left_alone: dict[str, np.ndarray]
    rows: dict[str, tuple[list[int], np.ndarray]]

    def merge(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a base's parameters with all of it merged in."""
        flat = paths.flatten(params)
        flat |= {path: leaf.astype(flat[path].dtype) for path, leaf in self.params.items()}
        norms = lora.column_norms(paths.unflatten(flat), self.adapters, self.spec) if self.left_alone else {}
        adapters = paths.flatten(self.adapters)
        for module, layers in self.left_alone.items():
            path = f"{module}/lora_magnitude"
            adapters[path] = np.where(layers[:, None], norms[module], adapters[path])
        adapters = paths.unflatten(adapters)
        flat = paths.flatten(new_rows.merge(lora.merge(paths.unflatten(flat), adapters, self.spec), adapters))
        for module, (ids, rows) in self.rows.items():
            path = f"{module}/{new_rows.TABLES[module]}"
            table, rows = jnp.asarray(flat[path]), jnp.asarray(rows)
            within = table.at[jnp.asarray(ids)] if path.endswith("/embedding") else table.at[:, jnp.asarray(ids)]
            flat[path] = within.set((rows if path.endswith("/embedding") else rows.T).astype(table.dtype))
        return paths.unflatten(flat)


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
    if len({target.dora for target in chosen.values()}) > 1:
        adapters, chosen = _all_dora(adapters, chosen, params)
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


def _all_dora(
    adapters: Mapping[str, Any], chosen: Mapping[str, lora.LoraTarget], params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, lora.LoraTarget]]:
    """Returns adapters and their targets with LoRA written as DoRA, magnitudes the norms of the columns as they are."""
    plain = {module: target for module, target in chosen.items() if not target.dora}
    spec = tuple(dataclasses.replace(target, pattern=re.escape(module)) for module, target in plain.items())
    inside, flat = tuple(f"{module}/" for module in plain), paths.flatten(adapters)
    own = paths.unflatten({path: leaf for path, leaf in flat.items() if path.startswith(inside)})
    kernels = paths.unflatten({path: leaf for path, leaf in paths.flatten(params).items() if path.startswith(inside)})
    norms = lora.column_norms(quantize.dequantize(kernels, jnp.float32), own, spec)
    flat |= {f"{module}/lora_magnitude": norm for module, norm in norms.items()}
    return paths.unflatten(flat), {module: dataclasses.replace(target, dora=True) for module, target in chosen.items()}


def about(folder: epath.PathLike) -> str:
    """Returns what to tell of a folder that `save_adapter` wrote: the vocabulary that its base must have."""
    indices = read_settings(epath.Path(folder) / CONFIG)["trainable_token_indices"]
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
    settings = read_settings(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{folder} has no {WEIGHTS}; save the adapter with safetensors (pickles are not read)")
    tensors = {name.removeprefix(PREFIX): x for name, x in open_safetensors(folder / WEIGHTS).items()}
    used: set[str] = set()
    modules = {paths.parent(leaf.rule.ours): leaf for leaf in leaves(config) if leaf.rule.op is TRANSPOSE}
    stacks = {module: _read_module(leaf, tensors, settings, used) for module, leaf in modules.items()}
    stacks = {module: stack for module, stack in stacks.items() if stack is not None}
    tables = [leaf for leaf in leaves(config) if paths.parent(leaf.rule.ours) in new_rows.TABLES]
    rows = {paths.parent(leaf.rule.ours): _read_rows(leaf, tensors, settings, used) for leaf in tables}
    params = _read_whole(config, tensors, used)
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise UserError(
            f"{folder / WEIGHTS} has {len(unknown)} tensors that belong to no module of this model, or to part of one: "
            f"{', '.join(unknown[:5])}; give the base model it was trained on"
        )
    flat = {f"{module}/{name}": leaf for module, stack in stacks.items() for name, leaf in stack.leaves.items()}
    size, others = config.text_config.vocab_size, {}
    for module, (ids, table) in rows.items():
        if ids == list(range(size - len(ids), size)):
            flat |= {f"{module}/{new_rows.NAME}": table if module.endswith("embed_tokens") else table.T} if ids else {}
        else:
            others[module] = ids, table
    if not flat:
        raise UserError(f"{folder / WEIGHTS} holds no adapter of this model; give the base model it was trained on")
    spec = tuple(dataclasses.replace(stack.target, pattern=re.escape(module)) for module, stack in stacks.items())
    left_alone = {m: stack.left_alone for m, stack in stacks.items() if stack.target.dora and stack.left_alone.any()}
    return Adapter(paths.unflatten(flat), spec, params, left_alone, others)


def _read_whole(config: Idefics2Config, tensors: Mapping[str, LazyTensor], used: set[str]) -> dict[str, np.ndarray]:
    """Returns {path: array} of the parameters that the file holds whole."""
    params = {}
    for leaf in leaves(config):
        # Of a head that it adapts peft saves what lies under the adapter, too.
        for names in (leaf.names, [name.removesuffix("weight") + "base_layer.weight" for name in leaf.names]):
            if set(names) <= set(tensors):
                layers = [leaf.rule.op.to_ours(_read(tensors, name, leaf.hf_shape, used)) for name in names]
                params[leaf.rule.ours] = np.stack(layers) if leaf.rule.stacked else layers[0]
    return params


@dataclasses.dataclass(frozen=True)
class _Stacked:
    """Adapters of a family of modules, one a layer.

    Attributes:
      leaves: {leaf's name: array [L, ..]}; without L where there is one module alone.
      target: the largest rank, and the scale of them all.
      left_alone: which layers have no adapter, bool [L]; theirs adds nothing.
    """

    leaves: dict[str, np.ndarray]
    target: lora.LoraTarget
    left_alone: np.ndarray


def _read_module(
    leaf: Leaf, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], used: set[str]
) -> _Stacked | None:
    """Reads a family's adapters, stacked over its layers; None if it has none."""
    modules = [name.removesuffix(".weight") for name in leaf.names]
    adapted = [module for module in modules if f"{module}.{LEAVES['lora_A']}" in tensors]
    if not adapted:
        return None
    spec = [_target(module, tensors, settings, leaf) if module in adapted else None for module in modules]
    like = max((target for target in spec if target), key=lambda target: target.rank)
    layers = [
        _read_layer(module, target, like, leaf.hf_shape, tensors, used)
        for module, target in zip(modules, spec, strict=True)
    ]
    stacks = {name: [layer[name] for layer in layers] for name in layers[0]}
    return _Stacked(
        {name: np.stack(own) if leaf.rule.stacked else own[0] for name, own in stacks.items()},
        like,
        np.array([target is None for target in spec]),
    )


def _read_layer(
    module: str,
    target: lora.LoraTarget | None,
    like: lora.LoraTarget,
    hf_shape: tuple[int, ...],
    tensors: Mapping[str, LazyTensor],
    used: set[str],
) -> dict[str, np.ndarray]:
    """Returns a layer's adapter at the rank and scale of `like`; without a target of its own one that adds nothing.

    A lower rank is a higher one with zeros, and another scale is in B.
    """
    (size_out, size_in), rank = hf_shape, target.rank if target else 0
    shapes = {"lora_A": (rank, size_in), "lora_B": (size_out, rank)}
    shapes |= {"lora_magnitude": (size_out,)} if like.dora else {}
    read = {
        name: _read(tensors, f"{module}.{LEAVES[name]}", shape, used) if target else np.zeros(shape)
        for name, shape in shapes.items()
    }
    own = {name: np.asarray(array.T, np.float32) for name, array in read.items()}
    scale = np.float32(target.scale / like.scale if target else 1.0)
    own["lora_A"] = np.pad(own["lora_A"], ((0, 0), (0, like.rank - rank)))
    own["lora_B"] = np.pad(own["lora_B"], ((0, like.rank - rank), (0, 0))) * scale
    return own


def _target(module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], leaf: Leaf) -> lora.LoraTarget:
    """Returns the rank and alpha of one of PEFT's modules, of which the first is in the file too."""
    rank = tensors[f"{module}.{LEAVES['lora_A']}"].shape[0]
    told = of_module(module, settings, "rank_pattern", "r")
    if told != rank:
        raise UserError(
            f"{leaf.rule.hf}: the adapter's rank is {rank} where {CONFIG} says {told}; the two files are not of one "
            "adapter"
        )
    alpha = float(of_module(module, settings, "alpha_pattern", "lora_alpha"))
    alpha *= math.sqrt(rank) if settings.get("use_rslora") else 1.0
    dropout = float(settings.get("lora_dropout") or 0.0)
    return lora.LoraTarget(re.escape(module), rank, alpha, dropout, bool(settings.get("use_dora")))


def _read_rows(
    leaf: Leaf, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], used: set[str]
) -> tuple[list[int], np.ndarray]:
    """Returns the ids of a table's trained rows, if there are any, and the rows, [n, D] as Hugging Face has them."""
    name = leaf.names[0].removesuffix("weight") + ROWS
    if name not in tensors:
        return [], np.zeros((0, leaf.hf_shape[1]), np.float32)
    module, size = paths.parent(leaf.rule.ours), leaf.hf_shape[0]
    rows = _read(tensors, name, (tensors[name].shape[0], leaf.hf_shape[1]), used)
    ids = settings.get("trainable_token_indices")
    ids = ids.get(module.rpartition("/")[2]) if isinstance(ids, dict) else ids
    whole = isinstance(ids, list) and all(isinstance(index, int) and index >= 0 for index in ids)
    if not whole or len(set(ids)) < len(ids) or len(ids) != len(rows):
        raise UserError(
            f"trainable_token_indices of {module} are {ids}; they must be {len(rows)} different ids, one a saved row"
        )
    if max(ids) >= size:
        raise UserError(
            f"the adapter trains the rows {ids[0]} to {ids[-1]} of {module}, and the base has {size}; grow it: "
            f"call transformers' model.resize_token_embeddings({1 + max(ids)}), and give the folder that it saves"
        )
    return ids, np.asarray(rows, np.float32)


def _read(tensors: Mapping[str, LazyTensor], name: str, shape: Iterable[int], used: set[str]) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"the adapter lacks {name}; it is not whole, save it again")
    if tensors[name].shape != tuple(shape):
        raise UserError(f"the adapter's {name} is {list(tensors[name].shape)} and should be {list(shape)}")
    used.add(name)
    return np.asarray(tensors[name])
