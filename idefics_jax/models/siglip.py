"""SigLIP vision encoder at native aspect ratio (reference: Idefics2VisionTransformer).

It sees rows of patches from several images; a patch attends to the patches of its own image only. Where a patch
lies comes in as an index into the position table, computed on the host (images.position_ids).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from idefics_jax.attention import Visibility, attend, filled_length
from idefics_jax.config import VisionConfig
from idefics_jax.layers import ACTIVATIONS, Dtype, Embedding, LayerNorm, Linear, shared_lora_a
from idefics_jax.sharding import constrain
from idefics_jax.stack import stack


def normalize(patches: jax.Array) -> jax.Array:
    """Maps uint8 patches to [-1, 1] as the reference's processor does (mean and std 0.5); floats pass unchanged."""
    if patches.dtype == jnp.uint8:
        return patches.astype(jnp.float32) * (2.0 / 255.0) - 1.0
    return patches


class Embeddings(nn.Module):
    """Patches [M, S, C] and their positions [M, S] -> [M, S, E]."""

    config: VisionConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, patches: jax.Array, positions: jax.Array) -> jax.Array:
        config = self.config
        axes, std = ("patch", "vision_embed"), config.initializer_range
        patch_embedding = Linear(config.hidden_size, axes, std, self.dtype, use_bias=True, name="patch_embedding")
        position_embedding = Embedding(
            size=config.positions_per_side**2,
            features=config.hidden_size,
            axes=("position", "vision_embed"),
            std=std,
            dtype=self.dtype,
            name="position_embedding",
        )
        return patch_embedding(normalize(patches)) + position_embedding(positions)


class Attention(nn.Module):
    config: VisionConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, visibility: Visibility) -> jax.Array:
        config = self.config
        x_a = shared_lora_a(self, x, ("q_proj", "k_proj", "v_proj"))

        def project(name):
            axes = ("vision_embed", "vision_heads")
            linear = Linear(config.hidden_size, axes, config.initializer_range, self.dtype, use_bias=True, name=name)
            y = linear(x, x_a.get(name))
            return y.reshape(*x.shape[:-1], config.num_attention_heads, config.head_dim)

        heads = ("vision_heads", "vision_heads")
        y = attend(project("q_proj"), project("k_proj"), project("v_proj"), visibility, heads).reshape(x.shape)
        axes = ("vision_heads", "vision_embed")
        return Linear(config.hidden_size, axes, config.initializer_range, self.dtype, use_bias=True, name="out_proj")(y)


class MLP(nn.Module):
    config: VisionConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, std = self.config.hidden_size, self.config.initializer_range
        y = Linear(
            self.config.intermediate_size, ("vision_embed", "vision_mlp"), std, self.dtype, use_bias=True, name="fc1"
        )(x)
        y = ACTIVATIONS[self.config.hidden_act](y)
        return Linear(width, ("vision_mlp", "vision_embed"), std, self.dtype, use_bias=True, name="fc2")(y)


class Layer(nn.Module):
    config: VisionConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, visibility: Visibility, _) -> tuple[jax.Array, None]:
        eps = self.config.layer_norm_eps
        y = LayerNorm(eps, "vision_embed", name="layer_norm1")(x)
        x = x + Attention(self.config, self.dtype, name="self_attn")(y, visibility)
        y = LayerNorm(eps, "vision_embed", name="layer_norm2")(x)
        return x + MLP(self.config, self.dtype, name="mlp")(y), None


class Encoder(nn.Module):
    config: VisionConfig
    dtype: Dtype
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array, visibility: Visibility) -> jax.Array:
        layers = stack(Layer, length=self.config.num_hidden_layers, remat=self.remat)
        x, _ = layers(self.config, self.dtype, name="layers")(x, visibility, None)
        return x


class Siglip(nn.Module):
    """Vision part: `(patches, image_ids, positions) -> features`.

    Attributes:
      config: sizes.
      dtype: dtype of the arithmetic.
      remat: name in stack.REMAT_POLICIES.
    """

    config: VisionConfig
    dtype: Dtype
    remat: str

    @nn.compact
    def __call__(self, patches: jax.Array, image_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Encodes vision rows.

        Args:
          patches: uint8 (raw) or float (normalised) [B, V, S, C].
          image_ids: int32 [B, V, S], 0 = padding.
          positions: int32 [B, V, S], index into the position table.

        Returns:
          [B, V, S, E] in `dtype`; meaningless on padding.
        """
        shape = image_ids.shape
        more = (0, filled_length(shape[2], self.dtype) - shape[2])
        patches = jnp.pad(patches, ((0, 0), (0, 0), more, (0, 0)))
        image_ids, positions = (jnp.pad(x, ((0, 0), (0, 0), more)) for x in (image_ids, positions))
        rows = (shape[0] * shape[1], image_ids.shape[2])
        segments = image_ids.reshape(rows)
        x = Embeddings(self.config, self.dtype, name="embeddings")(
            patches.reshape(*rows, patches.shape[-1]), positions.reshape(rows)
        )
        x = constrain(x, ("act_batch", "act_patches", "act_embed"))
        x = Encoder(self.config, self.dtype, self.remat, name="encoder")(x, Visibility(segments, segments))
        x = LayerNorm(self.config.layer_norm_eps, "vision_embed", name="post_layernorm")(x)
        return x.reshape(*image_ids.shape, -1)[:, :, : shape[2]]
