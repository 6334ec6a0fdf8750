"""The model's configuration, to and from Hugging Face's `config.json`.

Field names and defaults are those of transformers' Idefics2Config and its parts, so a file that leaves a field out
means here what it means there. Fields this port does not read are kept in `extra` and written back unchanged;
values it cannot honour are refused by name.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from idefics_jax.errors import UserError

PARTS = ("vision_config", "perceiver_config", "text_config")
# The decoder of a file that has no text_config at all, where it differs from Mistral's own defaults.
DEFAULT_TEXT = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "pad_token_id": 0}
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "silu", "swish", "relu")
# Read from the file, but only ever with the one value this port computes.
FIXED = {"attention_dropout": 0.0}
# Read, and kept in `extra`, without a field of their own.
WITHOUT_FIELD = (*FIXED, "model_type", "num_channels", "quantization_config", "rope_parameters", "rope_scaling")


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the field, its value and the mend."""


def _check_number(where: str, value: Any, kind: type, *, or_zero: bool = False) -> None:
    number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not number or not (0 <= value < 2**63) or not (value or or_zero):
        noun = "a positive number" if kind is float else "a whole number of at least 1"
        noun = f"{noun} or 0" if or_zero else noun
        raise ConfigError(f"{where} is {value!r}; it must be {noun}")


def _check_part(part: Any, where: str) -> None:
    """Checks every number and activation of a part against the type its dataclass declares."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.type in (int, float):
            _check_number(f"{where}.{field.name}", value, field.type, or_zero=field.name == "initializer_range")
        elif field.name == "hidden_act" and value not in ACTIVATIONS:
            raise ConfigError(f"{where}.hidden_act is {value!r}; supported are {', '.join(ACTIVATIONS)}")


def _check_divides(where: str, whole: str, parts: str, config: Any) -> None:
    if getattr(config, whole) % getattr(config, parts):
        raise ConfigError(
            f"{where}.{whole} ({getattr(config, whole)}) must be a multiple of {parts} ({getattr(config, parts)})"
        )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP encoder (reference: Idefics2VisionConfig)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        _check_part(self, "vision_config")
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"vision_config.image_size is {self.image_size}, less than patch_size ({self.patch_size})"
            )
        _check_divides("vision_config", "hidden_size", "num_attention_heads", self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def positions_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Perceiver resampler (reference: Idefics2PerceiverConfig)."""

    hidden_size: int = 4096
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    resampler_n_latents: int = 64
    resampler_depth: int = 3
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    num_key_value_heads: int = 4
    initializer_range: float = 0.02
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        _check_part(self, "perceiver_config")
        _check_divides("perceiver_config", "resampler_n_heads", "num_key_value_heads", self)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Mistral decoder (reference: MistralConfig)."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int | None = 4096
    initializer_range: float = 0.02
    pad_token_id: int | None = None  # its embedding gets no gradient, as torch's padding_idx
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        if self.head_dim is None:
            _check_number("text_config.num_attention_heads", self.num_attention_heads, int)
            _check_divides("text_config", "hidden_size", "num_attention_heads", self)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _check_part(self, "text_config")
        _check_number("text_config.head_dim", self.head_dim, int)
        if self.head_dim % 2:
            raise ConfigError(f"text_config.head_dim is {self.head_dim}; rotary positions need an even number")
        if self.sliding_window is not None:
            _check_number("text_config.sliding_window", self.sliding_window, int)
        if self.pad_token_id is not None:
            _check_number("text_config.pad_token_id", self.pad_token_id, int, or_zero=True)
        _check_divides("text_config", "num_attention_heads", "num_key_value_heads", self)


@dataclasses.dataclass(frozen=True)
class Idefics2Config:
    """The whole model (reference: Idefics2Config)."""

    vision_config: VisionConfig
    perceiver_config: PerceiverConfig
    text_config: TextConfig
    image_token_id: int = 32001
    tie_word_embeddings: bool = False
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        _check_number("image_token_id", self.image_token_id, int, or_zero=True)
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"tie_word_embeddings is {self.tie_word_embeddings!r}; it must be true or false")
        if self.image_token_id >= self.text_config.vocab_size:
            raise ConfigError(
                f"image_token_id is {self.image_token_id}, outside text_config.vocab_size "
                f"({self.text_config.vocab_size}); resize the vocabulary or correct the id"
            )
        if self.perceiver_config.hidden_size != self.text_config.hidden_size:
            raise ConfigError(
                f"perceiver_config.hidden_size is {self.perceiver_config.hidden_size}; it must equal "
                f"text_config.hidden_size ({self.text_config.hidden_size})"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Idefics2Config":
        """Reads the dict of a `config.json`.

        Raises:
          ConfigError: the file is not Idefics2's, or a value in it is not supported.
        """
        if hf.get("model_type") != "idefics2":
            raise ConfigError(f"config.json has model_type {hf.get('model_type')!r}; this port reads 'idefics2'")
        hf = {name: value for name, value in hf.items() if name != "model_type"}
        text = _read_text(_section(hf, "text_config") if hf.get("text_config") is not None else DEFAULT_TEXT)
        perceiver = _section(hf, "perceiver_config")
        if perceiver.get("hidden_size", PerceiverConfig.hidden_size) != text.hidden_size:
            # As the reference does: a resampler of another width takes both of these from the decoder.
            perceiver = {**perceiver, "hidden_size": text.hidden_size, "rms_norm_eps": text.rms_norm_eps}
        vision = _section(hf, "vision_config")
        if vision.get("num_channels", 3) != 3:
            raise ConfigError(f"vision_config.num_channels is {vision['num_channels']!r}; only 3 is supported")
        if hf.get("quantization_config"):
            raise ConfigError("config.json has a quantization_config; only weights in float types are supported")
        top = {name: value for name, value in hf.items() if name not in PARTS}
        return _read(
            cls,
            top,
            "config.json",
            vision_config=_read(VisionConfig, vision, "vision_config"),
            perceiver_config=_read(PerceiverConfig, perceiver, "perceiver_config"),
            text_config=text,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the dict of a `config.json` that transformers loads; `from_hf` reads it back unchanged."""
        text = _write(self.text_config)
        rope = text.get("rope_parameters") or {"rope_type": "default"}
        text["rope_parameters"] = {**rope, "rope_theta": text["rope_theta"]}
        if "rope_theta" not in self.text_config.extra:  # an older file's place for it
            del text["rope_theta"]
        text.setdefault("model_type", "mistral")
        return {
            "architectures": ["Idefics2ForConditionalGeneration"],
            **_write(self),
            "model_type": "idefics2",
            "vision_config": {"model_type": "idefics2_vision", **_write(self.vision_config)},
            "perceiver_config": {"model_type": "idefics2_perceiver", **_write(self.perceiver_config)},
            "text_config": text,
        }

    @classmethod
    def load(cls, path: epath.PathLike) -> "Idefics2Config":
        """Reads a `config.json`, or the one in the folder `path`.

        Raises:
          ConfigError: it is missing, is not JSON, or `from_hf` refuses it.
        """
        return cls.from_hf(read_json(path))


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Returns what a `config.json` holds, or the one in the folder `path`; raises ConfigError if it is none."""
    path = epath.Path(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a folder that holds a Hugging Face config.json")
    try:
        hf = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(hf, dict):
        raise ConfigError(f"{path} holds a {type(hf).__name__}; a config.json holds one object")
    return hf


def _section(hf: Mapping[str, Any], name: str, of: str = "") -> dict[str, Any]:
    section = hf.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{of}{name} is {section!r}; it must be an object")
    return dict(section)


def _read(cls: type, hf: Mapping[str, Any], where: str, **parts: Any) -> Any:
    """Builds a part from its section: fields by name, the rest kept in `extra`."""
    for name, allowed in FIXED.items():
        if hf.get(name, allowed) != allowed:
            raise ConfigError(f"{where}.{name} is {hf[name]!r}; only {allowed} is supported")
    known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
    fields = {name: value for name, value in hf.items() if name in known}
    extra = {name: value for name, value in hf.items() if name not in known}
    return cls(**fields, **parts, extra=extra)


def _read_text(hf: Mapping[str, Any]) -> TextConfig:
    """Reads the decoder's section; rotary settings stand in one of two places, by the file's age."""
    if hf.get("model_type", "mistral") != "mistral":
        raise ConfigError(f"text_config.model_type is {hf['model_type']!r}; supported is 'mistral'")
    for name in ("rope_parameters", "rope_scaling"):
        rope = _section(hf, name, of="text_config.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"text_config.{name} asks for {kind!r}; only 'default' rotary positions are supported")
        other = sorted(set(rope) - {"rope_type", "type", "rope_theta"})
        if other and not (other == ["partial_rotary_factor"] and rope["partial_rotary_factor"] in (1, None)):
            raise ConfigError(f"text_config.{name}.{other[0]} is {rope[other[0]]!r}; it is not supported")
    theta = (hf.get("rope_parameters") or {}).get("rope_theta", hf.get("rope_theta", TextConfig.rope_theta))
    config = _read(TextConfig, {**hf, "rope_theta": theta}, "text_config")
    if "rope_theta" not in hf:
        return config
    return dataclasses.replace(config, extra={**config.extra, "rope_theta": hf["rope_theta"]})  # kept where it stood


def _write(part: Any) -> dict[str, Any]:
    """Returns a part's own fields over those kept from its file."""
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    own = {name: value for name, value in fields.items() if name not in ("extra", *PARTS)}
    return {**part.extra, **own}
