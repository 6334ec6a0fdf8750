"""Pretrained parts as they are published alone: a SigLIP folder's vision tower, a Mistral folder's decoder.

Their tensors have the names of Idefics2's behind another prefix, so the table of rules.py serves for them too.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from idefics_jax.config import ConfigError, Idefics2Config, TextConfig, VisionConfig, read_json
from idefics_jax.convert.hf import iter_from_hf
from idefics_jax.convert.hf_folder import HfFolder


@dataclasses.dataclass(frozen=True)
class Form:
    """How a part is published.

    Attributes:
      model_types: of its config.json.
      names: (pattern, replacement) to the name that the tensor has in Idefics2; the first that matches all of it.
      left_out: openings of the names that Idefics2 has no use for.
    """

    model_types: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]


FORMS = {
    "vision_model": Form(
        model_types=("siglip", "siglip_vision_model"),
        names=((r"(?:vision_model\.)?((?:embeddings|encoder|post_layernorm)\..*)", r"model.vision_model.\1"),),
        # The tower's pooling head, and the other half of the contrastive model.
        left_out=("vision_model.head.", "head.", "text_model.", "logit_scale", "logit_bias"),
    ),
    "text_model": Form(
        model_types=("mistral",),
        names=((r"model\.(.*)", r"model.text_model.\1"), (r"(lm_head\..*)", r"\1")),
        left_out=(),
    ),
}


def read_sizes(path: epath.PathLike, part: str) -> VisionConfig | TextConfig:
    """Returns the sizes of a part from the config.json of its folder.

    Args:
      path: a Hugging Face folder.
      part: name in FORMS.

    Raises:
      ConfigError: the file is missing or damaged, or is of another kind of model.
    """
    hf, known = read_json(path), FORMS[part].model_types
    if hf.get("model_type") not in known:
        raise ConfigError(
            f"{path}/config.json has model_type {hf.get('model_type')!r}; {part} can be read from {' or '.join(known)}"
        )
    # Any id, as the place of `<image>` is not a part's to say.
    whole = {"model_type": "idefics2", "image_token_id": 1}
    if part == "text_model":
        return Idefics2Config.from_hf({**whole, "text_config": hf}).text_config
    section = hf.get("vision_config") or {} if hf["model_type"] == "siglip" else hf
    # SiglipVisionConfig's default, where it differs from Idefics2's.
    return Idefics2Config.from_hf({**whole, "vision_config": {"patch_size": 16, **section}}).vision_config


def open_part(path: epath.PathLike, part: str, config: Idefics2Config) -> tuple[Iterator[tuple[str, np.ndarray]], str]:
    """Opens a part's folder.

    Args:
      path: a Hugging Face folder with safetensors.
      part: name in FORMS.
      config: a model that has the part at the part's own sizes.

    Returns:
      ("a/b/c", array) of the part's parameters, a leaf at a time; and what of the folder is left out, in words.

    Raises:
      UserError: there are no safetensors; while iterating, as from_hf. A tensor that is neither read nor known to be
        of no use is unexpected.
    """
    form, tensors = FORMS[part], HfFolder(path)
    unused = [name for name in tensors if name.startswith(form.left_out)]
    renamed = {_name(name, form): tensors[name] for name in tensors if name not in unused}
    return iter_from_hf(renamed, config, part=part), _summary(unused, form)


def _summary(names: Iterable[str], form: Form) -> str:
    """Counts names by how they open: "logit_bias, text_model.* (27)"."""
    counts = dict.fromkeys(form.left_out, 0)
    for name in names:
        counts[next(start for start in counts if name.startswith(start))] += 1
    return ", ".join(f"{start}* ({count})" if start[-1] == "." else start for start, count in counts.items() if count)


def _name(name: str, form: Form) -> str:
    for pattern, replacement in form.names:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name
