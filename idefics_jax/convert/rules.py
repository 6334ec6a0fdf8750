"""One table between Hugging Face's tensors and our parameters, read in both directions.

A row names a family: `{}` in its Hugging Face name is the layer, and the layers of a family are stacked on the leading
axis of one leaf of ours. Names on the left are those that transformers 5.23 saves for Idefics2ForConditionalGeneration,
which are also those of the released checkpoints.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from idefics_jax.config import Idefics2Config
from idefics_jax.param_transforms.paths import flatten
from idefics_jax.param_tree import param_shapes

Array = Any  # numpy or JAX array: an op uses only methods that both have


@dataclasses.dataclass(frozen=True)
class Op:
    """A change of layout and its inverse, of one layer's tensor."""

    name: str
    to_ours: Callable[[Array], Array]
    to_hf: Callable[[Array], Array]


def _convolution_to_kernel(weight: Array) -> Array:
    """[E, channel, row, column] -> [row * column * channel, E], the order of a batch's patches."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _kernel_to_convolution(kernel: Array) -> Array:
    side = math.isqrt(kernel.shape[0] // 3)
    return kernel.reshape(side, side, 3, kernel.shape[1]).transpose(3, 2, 0, 1)


SAME = Op("same", lambda x: x, lambda x: x)
TRANSPOSE = Op("transpose", lambda x: x.T, lambda x: x.T)
PATCHES = Op("patches", _convolution_to_kernel, _kernel_to_convolution)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One family of tensors.

    Attributes:
      hf: name in a Hugging Face file; `{}` stands for the layer.
      ours: path in our parameters, parts joined by `/`.
      op: the change of layout between the two.
    """

    hf: str
    ours: str
    op: Op

    @property
    def stacked(self) -> bool:
        """Whether the family has one tensor a layer."""
        return "{}" in self.hf


def _section(hf: str, ours: str, *rows: tuple[str, str, Op]) -> tuple[Rule, ...]:
    """Returns rows whose names share a prefix on either side."""
    return tuple(Rule(hf + name, ours + path, op) for name, path, op in rows)


HEAD = "lm_head.weight"
EMBEDDING = "model.text_model.embed_tokens.weight"

RULES = (
    *_section(
        "model.vision_model.",
        "vision_model/",
        ("embeddings.patch_embedding.weight", "embeddings/patch_embedding/kernel", PATCHES),
        ("embeddings.patch_embedding.bias", "embeddings/patch_embedding/bias", SAME),
        ("embeddings.position_embedding.weight", "embeddings/position_embedding/embedding", SAME),
        ("post_layernorm.weight", "post_layernorm/scale", SAME),
        ("post_layernorm.bias", "post_layernorm/bias", SAME),
    ),
    *_section(
        "model.vision_model.encoder.layers.{}.",
        "vision_model/encoder/layers/",
        ("layer_norm1.weight", "layer_norm1/scale", SAME),
        ("layer_norm1.bias", "layer_norm1/bias", SAME),
        ("self_attn.q_proj.weight", "self_attn/q_proj/kernel", TRANSPOSE),
        ("self_attn.q_proj.bias", "self_attn/q_proj/bias", SAME),
        ("self_attn.k_proj.weight", "self_attn/k_proj/kernel", TRANSPOSE),
        ("self_attn.k_proj.bias", "self_attn/k_proj/bias", SAME),
        ("self_attn.v_proj.weight", "self_attn/v_proj/kernel", TRANSPOSE),
        ("self_attn.v_proj.bias", "self_attn/v_proj/bias", SAME),
        ("self_attn.out_proj.weight", "self_attn/out_proj/kernel", TRANSPOSE),
        ("self_attn.out_proj.bias", "self_attn/out_proj/bias", SAME),
        ("layer_norm2.weight", "layer_norm2/scale", SAME),
        ("layer_norm2.bias", "layer_norm2/bias", SAME),
        ("mlp.fc1.weight", "mlp/fc1/kernel", TRANSPOSE),
        ("mlp.fc1.bias", "mlp/fc1/bias", SAME),
        ("mlp.fc2.weight", "mlp/fc2/kernel", TRANSPOSE),
        ("mlp.fc2.bias", "mlp/fc2/bias", SAME),
    ),
    *_section(
        "model.connector.modality_projection.",
        "connector/modality_projection/",
        ("gate_proj.weight", "gate_proj/kernel", TRANSPOSE),
        ("up_proj.weight", "up_proj/kernel", TRANSPOSE),
        ("down_proj.weight", "down_proj/kernel", TRANSPOSE),
    ),
    *_section(
        "model.connector.perceiver_resampler.",
        "connector/perceiver_resampler/",
        ("latents", "latents", SAME),
        ("norm.weight", "norm/scale", SAME),
    ),
    *_section(
        "model.connector.perceiver_resampler.layers.{}.",
        "connector/perceiver_resampler/layers/",
        ("input_latents_norm.weight", "input_latents_norm/scale", SAME),
        ("input_context_norm.weight", "input_context_norm/scale", SAME),
        ("self_attn.q_proj.weight", "self_attn/q_proj/kernel", TRANSPOSE),
        ("self_attn.k_proj.weight", "self_attn/k_proj/kernel", TRANSPOSE),
        ("self_attn.v_proj.weight", "self_attn/v_proj/kernel", TRANSPOSE),
        ("self_attn.o_proj.weight", "self_attn/o_proj/kernel", TRANSPOSE),
        ("post_attention_layernorm.weight", "post_attention_layernorm/scale", SAME),
        ("mlp.gate_proj.weight", "mlp/gate_proj/kernel", TRANSPOSE),
        ("mlp.up_proj.weight", "mlp/up_proj/kernel", TRANSPOSE),
        ("mlp.down_proj.weight", "mlp/down_proj/kernel", TRANSPOSE),
    ),
    *_section(
        "model.text_model.layers.{}.",
        "text_model/layers/",
        ("input_layernorm.weight", "input_layernorm/scale", SAME),
        ("self_attn.q_proj.weight", "self_attn/q_proj/kernel", TRANSPOSE),
        ("self_attn.k_proj.weight", "self_attn/k_proj/kernel", TRANSPOSE),
        ("self_attn.v_proj.weight", "self_attn/v_proj/kernel", TRANSPOSE),
        ("self_attn.o_proj.weight", "self_attn/o_proj/kernel", TRANSPOSE),
        ("post_attention_layernorm.weight", "post_attention_layernorm/scale", SAME),
        ("mlp.gate_proj.weight", "mlp/gate_proj/kernel", TRANSPOSE),
        ("mlp.up_proj.weight", "mlp/up_proj/kernel", TRANSPOSE),
        ("mlp.down_proj.weight", "mlp/down_proj/kernel", TRANSPOSE),
    ),
    Rule(EMBEDDING, "text_model/embed_tokens/embedding", SAME),
    Rule("model.text_model.norm.weight", "text_model/norm/scale", SAME),
    # Absent where the head is the embedding table (tie_word_embeddings).
    Rule(HEAD, "text_model/lm_head/kernel", TRANSPOSE),
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of our parameters and the tensors of a Hugging Face file it is made of.

    Attributes:
      rule: its row.
      shape: its shape.
      names: the Hugging Face names, in the order of its layers.
      hf_shape: the shape of each of them.
    """

    rule: Rule
    shape: tuple[int, ...]
    names: tuple[str, ...]
    hf_shape: tuple[int, ...]


@functools.cache
def leaves(config: Idefics2Config) -> tuple[Leaf, ...]:
    """Returns every leaf of a model of this config, in the order of the table."""
    shapes = flatten(param_shapes(config))
    rows = [rule for rule in RULES if rule.ours in shapes]
    unruled = sorted(set(shapes) - {rule.ours for rule in rows})
    if unruled:
        raise ValueError(f"parameter {unruled[0]} has no row in convert/rules.py; add one")
    return tuple(_leaf(rule, tuple(shapes[rule.ours].shape)) for rule in rows)


def _leaf(rule: Rule, shape: tuple[int, ...]) -> Leaf:
    layer = jax.ShapeDtypeStruct(shape[1:] if rule.stacked else shape, np.float32)
    names = tuple(rule.hf.format(i) for i in range(shape[0])) if rule.stacked else (rule.hf,)
    return Leaf(rule, shape, names, tuple(jax.eval_shape(rule.op.to_hf, layer).shape))
