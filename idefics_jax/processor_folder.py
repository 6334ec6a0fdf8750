"""The processor as a Hugging Face folder, in both directions.

    tokenizer.model, tokenizer.json            the same pieces, for sentencepiece and for transformers
    tokenizer_config.json, special_tokens_map.json, added_tokens.json
    preprocessor_config.json                   image rules; three keys of ours among them, which transformers ignores
    processor_config.json, chat_template.jinja

Values this port does not honour are refused by name, never overlooked.
"""

import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from idefics_jax import tokenizer_json
from idefics_jax.buckets import check, write_whole
from idefics_jax.chat import CHAT_TEMPLATE
from idefics_jax.config import Idefics2Config
from idefics_jax.errors import UserError
from idefics_jax.images import ImageRules
from idefics_jax.tokenizer import CONTROL_TOKENS, Tokenizer

# What the device does to pixels (batch.py), in the reference's words, and how they were made; no other value is read.
_FIXED_IMAGE_VALUES = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 2,  # bilinear
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_FIXED_TOKENIZER_VALUES = {"legacy": False, "add_bos_token": True, "add_eos_token": False, "add_prefix_space": True}
_RELEASED_LATENTS = 64  # transformers' default for image_seq_len
_MAX_PIXELS = 64_000_000  # where the folder does not say, being written by others


def read(folder: epath.PathLike) -> tuple[Tokenizer, ImageRules, int]:
    """Reads a folder written by `write` or by transformers: tokenizer, image rules, `<image>` tokens an image takes.

    Patch size and position table come from preprocessor_config.json, or from the model's config.json beside it.

    Raises:
      UserError: a file is missing or damaged, or holds a value that is not supported.
    """
    check(folder)
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds an Idefics2 processor")
    try:
        tokenizer = _read_tokenizer(folder)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the tokenizer's files in {folder} are damaged ({type(error).__name__}: {error}); copy them again from "
            "the model's repository"
        ) from error
    processor = _read_json(folder / "processor_config.json") or {}
    latents = processor.get("image_seq_len", _RELEASED_LATENTS)
    where, images = "processor_config.json: image_processor", processor.get("image_processor")
    if images is None:
        where, images = "preprocessor_config.json", _read_json(folder / "preprocessor_config.json")
    if images is None:
        raise UserError(f"{folder} holds no preprocessor_config.json; copy it from the model's repository")
    model = Idefics2Config.load(folder) if (folder / "config.json").exists() else None
    rules = _read_rules(images, f"{folder}/{where}", model)
    if model is not None:
        _check_model(folder, tokenizer, rules, latents, model)
    _warn_of_other_template(folder)
    return tokenizer, rules, latents


def write(folder: epath.PathLike, tokenizer: Tokenizer, rules: ImageRules, num_latents: int) -> None:
    """Writes a folder that transformers' AutoProcessor loads; each file appears whole or not at all."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = tokenizer_json.special_tokens(tokenizer)
    unk, bos, eos = (special[index] for index in (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id))
    write_whole(folder / "tokenizer.model", tokenizer.model)
    _write_json(folder / "tokenizer.json", tokenizer_json.to_json(tokenizer))
    _write_json(
        folder / "tokenizer_config.json",
        {
            **_FIXED_TOKENIZER_VALUES,
            "added_tokens_decoder": {str(i): tokenizer_json.added_token(name) for i, name in special.items()},
            "additional_special_tokens": list(CONTROL_TOKENS),
            "bos_token": bos,
            "clean_up_tokenization_spaces": False,
            "eos_token": eos,
            "model_max_length": int(1e30),  # transformers' word for "no limit"
            "pad_token": unk,
            "padding_side": "left",
            "processor_class": "Idefics2Processor",
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": unk,
        },
    )
    _write_json(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": list(CONTROL_TOKENS),
            **{"bos_token": bos, "eos_token": eos, "pad_token": unk, "unk_token": unk},
        },
    )
    _write_json(folder / "added_tokens.json", {name: i for i, name in special.items() if name in CONTROL_TOKENS})
    _write_json(
        folder / "preprocessor_config.json",
        {
            **_FIXED_IMAGE_VALUES,
            "do_image_splitting": rules.split,
            "do_pad": True,
            "image_processor_type": "Idefics2ImageProcessor",
            "processor_class": "Idefics2Processor",
            "size": {"longest_edge": rules.longest_edge, "shortest_edge": rules.shortest_edge},
            "patch_size": rules.patch_size,
            "positions_per_side": rules.positions_per_side,
            "max_pixels": rules.max_pixels,
        },
    )
    _write_json(
        folder / "processor_config.json", {"image_seq_len": num_latents, "processor_class": "Idefics2Processor"}
    )
    write_whole(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())


def _read_tokenizer(folder: epath.Path) -> Tokenizer:
    """Takes tokenizer.model; where a tokenizer.json ranks its merges otherwise that rules, as in transformers."""
    config = _read_json(folder / "tokenizer_config.json") or {}
    _check_fixed(config, _FIXED_TOKENIZER_VALUES, f"{folder}/tokenizer_config.json")
    model = folder / "tokenizer.model"
    content = _read_json(folder / "tokenizer.json")
    tokenizer = Tokenizer.load(model) if model.exists() else None
    if content is None and tokenizer is None:
        raise UserError(f"{folder} holds neither tokenizer.model nor tokenizer.json; copy one from the model")
    if content is not None and (tokenizer is None or not tokenizer_json.same_ids(content, tokenizer)):
        tokenizer = tokenizer_json.from_json(content)
    added = {token["content"]: token["id"] for token in (content or {}).get("added_tokens", [])}
    added |= {entry["content"]: int(index) for index, entry in config.get("added_tokens_decoder", {}).items()}
    added |= _read_json(folder / "added_tokens.json") or {}
    for name, index in zip(CONTROL_TOKENS, range(tokenizer.fake_token_id, tokenizer.vocab_size), strict=True):
        if added.get(name, index) != index:
            raise UserError(f"{folder} gives {name} the id {added[name]}; only {index}, Idefics2's place, is supported")
    return tokenizer


def _read_rules(images: Mapping[str, Any], where: str, model: Idefics2Config | None) -> ImageRules:
    _check_fixed(images, _FIXED_IMAGE_VALUES, where)
    size = images.get("size")
    if not isinstance(size, dict) or not {"longest_edge", "shortest_edge"} <= set(size):
        raise UserError(f"{where}: size is {size!r}; it must have longest_edge and shortest_edge")
    patch_size, positions = images.get("patch_size"), images.get("positions_per_side")
    if patch_size is None or positions is None:
        if model is None:
            raise UserError(
                f"{where} does not say patch_size and positions_per_side; put the model's config.json beside it"
            )
        patch_size, positions = model.vision_config.patch_size, model.vision_config.positions_per_side
    return ImageRules(
        patch_size=patch_size,
        longest_edge=size["longest_edge"],
        shortest_edge=size["shortest_edge"],
        positions_per_side=positions,
        split=images.get("do_image_splitting", False),
        max_pixels=images.get("max_pixels", _MAX_PIXELS),
    )


def _check_model(
    folder: epath.Path, tokenizer: Tokenizer, rules: ImageRules, latents: int, model: Idefics2Config
) -> None:
    """Refuses a processor that does not belong to the model beside it."""
    for name, ours, theirs in (
        ("image_token_id", tokenizer.image_token_id, model.image_token_id),
        ("perceiver_config.resampler_n_latents", latents, model.perceiver_config.resampler_n_latents),
        ("vision_config.patch_size", rules.patch_size, model.vision_config.patch_size),
        ("vision_config.image_size // patch_size", rules.positions_per_side, model.vision_config.positions_per_side),
    ):
        if ours != theirs:
            raise UserError(
                f"{folder}/config.json has {name} = {theirs} and the processor beside it {ours}; "
                "take both from the same model"
            )
    if tokenizer.vocab_size > model.text_config.vocab_size:  # as in the released base model
        logging.warning(
            "%s: the model has %d embeddings and the tokenizer %d ids; resize them before training on conversations",
            folder,
            model.text_config.vocab_size,
            tokenizer.vocab_size,
        )


def _check_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for name, only in fixed.items():
        value = values.get(name)
        if value is not None and value != only:
            raise UserError(f"{where}: {name} is {value!r}; only {only!r} is supported")


def _warn_of_other_template(folder: epath.Path) -> None:
    path = folder / "chat_template.jinja"
    if path.exists() and path.read_text().strip() != CHAT_TEMPLATE.strip():
        logging.warning("%s is not the released chat template; conversations are rendered by the released one", path)


def _read_json(path: epath.Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy it again from the model's repository") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must hold one object")
    return content


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
