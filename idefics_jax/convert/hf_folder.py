"""A Hugging Face model folder: config.json and safetensors, whole or in shards.

Every file goes through the safetensors library, which refuses a malformed header before anything is allocated. A
tensor is read when it is asked for, so no more than one is held beside what the caller keeps. Pickles are refused.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from idefics_jax import full_disk
from idefics_jax.buckets import need_disk
from idefics_jax.config import Idefics2Config
from idefics_jax.convert.hf import check_params, iter_to_hf
from idefics_jax.convert.rules import leaves
from idefics_jax.convert.staging import staged
from idefics_jax.errors import UserError
from idefics_jax.param_transforms.paths import flatten
from idefics_jax.processor import Processor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
SHARD_BYTES = 5_000_000_000
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class LazyTensor:
    """A tensor in a file: shape and dtype from the header, numbers when `np.asarray` asks."""

    def __init__(self, file: Any, name: str, where: str):
        view = file.get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise UserError(f"{where}: {name} is {view.get_dtype()}; supported are {', '.join(DTYPES)}")
        self.shape = tuple(view.get_shape())
        self.dtype = DTYPES[view.get_dtype()]
        self._file, self._name = file, name

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._file.get_tensor(self._name)
        return array if dtype is None else array.astype(dtype)


class HfFolder(Mapping):
    """The tensors of a folder by name, each a LazyTensor, in sorted order.

    Raises:
      UserError: there are no safetensors, a file is damaged, or the index and the files do not agree.
    """

    def __init__(self, path: epath.PathLike):
        path = epath.Path(path)
        self._tensors: dict[str, LazyTensor] = {}
        if (path / SINGLE).exists():
            self._open(path / SINGLE, None)
        elif (path / INDEX).exists():
            for name, tensors in _read_index(path / INDEX).items():
                self._open(path / name, tensors)
        else:
            raise UserError(_nothing_to_read(path))

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __len__(self) -> int:
        return len(self._tensors)

    def _open(self, path: epath.Path, promised: set[str] | None) -> None:
        tensors = open_safetensors(path)
        if promised is not None and set(tensors) != promised:
            raise UserError(
                f"{path} and {INDEX} disagree on {', '.join(sorted(set(tensors) ^ promised))}; download both again"
            )
        self._tensors |= tensors


def open_safetensors(path: epath.Path) -> dict[str, LazyTensor]:
    """Returns the tensors of a file by name, each read when it is asked for; raises UserError if it is damaged."""
    file = _open_file(path)
    return {name: LazyTensor(file, name, str(path)) for name in file.keys()}  # noqa: SIM118 (it is no dict)


def is_hf_folder(path: epath.Path) -> bool:
    """Whether a folder holds weights in Hugging Face's form, safe or not."""
    return path.is_dir() and any(child.suffix in (".safetensors", *PICKLES) for child in path.iterdir())


def read_generation_config(path: epath.Path) -> dict[str, Any] | None:
    """Returns the generation_config.json of a folder, or None; raises UserError if it is damaged."""
    path = epath.Path(path) / GENERATION
    if not path.exists():
        return None
    return _read_json(path)


def write_hf_folder(
    path: epath.PathLike,
    params: Mapping[str, Any],
    config: Idefics2Config,
    processor: Processor | None,
    *,
    generation_config: Mapping[str, Any] | None,
    shard_bytes: int,
) -> None:
    """Writes a folder that transformers loads, whole or not at all.

    Args:
      path: the folder; it must not exist, or be empty.
      params: nested dict of arrays, written in their dtypes.
      config: the model's.
      processor: written beside the weights, or None.
      generation_config: content of generation_config.json; None = the processor's ids, or no file without one.
      shard_bytes: the most bytes of tensors in a file.

    Raises:
      UserError: the params are not the config's, or the folder cannot be written.
    """
    check_params(params, config)
    if generation_config is None and processor is not None:
        generation_config = _generation_config(processor)
    with staged(path, replace=False) as folder:
        _write_tensors(folder, params, config, shard_bytes)
        _write_json(folder / "config.json", _config_with_dtype(config, params))
        if generation_config is not None:
            _write_json(folder / GENERATION, generation_config)
        if processor is not None:
            processor.save(folder)


def _open_file(path: epath.Path) -> Any:
    """Opens a safetensors file, having checked its header."""
    need_disk(path, "safetensors")
    try:
        file = safetensors.safe_open(path, framework="numpy", backend="pread")
        _check_unique_names(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist though {INDEX} names it; download it again") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download it again") from error
    return file


def _check_unique_names(path: epath.Path) -> None:
    """Refuses a name given twice: safetensors itself keeps the last of them without a word."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise UserError(f"{path} is not a whole safetensors file ({twice[0]!r} stands twice); download it again")
        return dict(pairs)

    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        json.loads(file.read(length), object_pairs_hook=unique)


def _read_index(path: epath.Path) -> dict[str, set[str]]:
    """Returns {file name: tensors} of an index, whose files must lie beside it."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map; download it again")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        # One plain name: no folder, no "..", no control character.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII):
            raise UserError(f"{path} places {tensor} in {name!r}; only .safetensors files beside the index are read")
        files.setdefault(name, set()).add(tensor)
    return files


def _nothing_to_read(path: epath.Path) -> str:
    if not path.is_dir():
        return f"{path} is not a folder; give one that holds a Hugging Face model"
    pickles = sorted(child.name for child in path.iterdir() if child.suffix in PICKLES)
    if pickles:
        return (
            f"{path} holds {pickles[0]}, a format that can run code when it is opened, and no {SINGLE}; "
            "convert it to safetensors first (load it in transformers where that is safe, and save_pretrained)"
        )
    return f"{path} holds neither {SINGLE} nor {INDEX}; give a folder that holds a Hugging Face model"


def _write_tensors(folder: epath.Path, params: Mapping[str, Any], config: Idefics2Config, shard_bytes: int) -> None:
    shards = _plan(params, config, shard_bytes)
    files = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    tensors = iter_to_hf(params, config)
    for file, names in zip(files, shards, strict=True):
        shard = dict(next(tensors) for _ in names)
        try:
            safetensors.numpy.save_file(shard, folder / file, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise full_disk.os_error(error) or error from error
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(leaf.nbytes for leaf in flatten(params).values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan(params: Mapping[str, Any], config: Idefics2Config, shard_bytes: int) -> list[list[str]]:
    """Returns the names of each shard, in the order in which `iter_to_hf` yields them."""
    flat, shards, room = flatten(params), [[]], shard_bytes
    for leaf in leaves(config):
        size = flat[leaf.rule.ours].nbytes // len(leaf.names)
        for name in leaf.names:
            if size > room and shards[-1]:
                shards.append([])
                room = shard_bytes
            shards[-1].append(name)
            room -= size
    return shards


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _config_with_dtype(config: Idefics2Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json with the dtype of the weights, which transformers would otherwise cast them to."""
    hf = config.to_hf()
    dtypes = {np.dtype(leaf.dtype).name for leaf in flatten(params).values()}
    if len(dtypes) == 1:
        hf["torch_dtype" if "torch_dtype" in hf else "dtype"] = dtypes.pop()
    return hf


def _generation_config(processor: Processor) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": [tokenizer.eos_id, tokenizer.end_of_utterance_id],
        "pad_token_id": tokenizer.pad_id,
    }


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must hold one object")
    return content


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
