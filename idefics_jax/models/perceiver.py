"""Connector: modality projection, then a Perceiver resampler (reference: Idefics2Connector; paper, section 3.1).

All images of a row are resampled together: each image owns Q latents, and a latent sees the patches and the latents
of its own image only.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from idefics_jax.attention import Visibility, attend
from idefics_jax.config import Idefics2Config, PerceiverConfig
from idefics_jax.layers import Dtype, GatedMLP, Linear, RMSNorm
from idefics_jax.stack import stack


def new_weight_std(width: int, *, depth: int = 0) -> float:
    """Initialisation of connector weights in the authors' code: sqrt(0.4 / width), less for a resampler's o_proj.

    The width is the decoder's, whatever the weight's own input.
    """
    return (0.4 / (width * max(1, 2 * depth))) ** 0.5


class Attention(nn.Module):
    """Latents [B, M, D] attend to context [B, S, D] and to themselves."""

    config: PerceiverConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, latents: jax.Array, context: jax.Array, visibility: Visibility) -> jax.Array:
        config = self.config
        std = new_weight_std(config.hidden_size)
        heads, kv_heads, head_dim = config.resampler_n_heads, config.num_key_value_heads, config.resampler_head_dim
        q_proj = Linear(heads * head_dim, ("embed", "heads"), std, self.dtype, name="q_proj")
        k_proj = Linear(kv_heads * head_dim, ("embed", "kv_heads"), std, self.dtype, name="k_proj")
        v_proj = Linear(kv_heads * head_dim, ("embed", "kv_heads"), std, self.dtype, name="v_proj")

        def split(x):
            return x.reshape(*x.shape[:-1], -1, head_dim)

        keys_values = jnp.concatenate([context, latents], axis=1)
        y = attend(split(q_proj(latents)), split(k_proj(keys_values)), split(v_proj(keys_values)), visibility)
        out_std = new_weight_std(config.hidden_size, depth=config.resampler_depth)
        o_proj = Linear(config.hidden_size, ("heads", "embed"), out_std, self.dtype, name="o_proj")
        return o_proj(y.reshape(*latents.shape[:-1], -1))


class Layer(nn.Module):
    config: PerceiverConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, latents: jax.Array, shared: tuple[jax.Array, Visibility], _) -> tuple[jax.Array, None]:
        config, (context, visibility) = self.config, shared
        y = RMSNorm(config.rms_norm_eps, name="input_latents_norm")(latents)
        context = RMSNorm(config.rms_norm_eps, name="input_context_norm")(context)
        latents = latents + Attention(config, self.dtype, name="self_attn")(y, context, visibility)
        y = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")(latents)
        width = config.hidden_size
        std = new_weight_std(width)
        mlp = GatedMLP(4 * width, width, config.hidden_act, ("embed", "embed"), (std, std), self.dtype, name="mlp")
        return latents + mlp(y), None


class Resampler(nn.Module):
    """Context [B, S, D] of several images -> latents [B, I, Q, D]."""

    config: PerceiverConfig
    dtype: Dtype
    remat: str

    @nn.compact
    def __call__(self, context: jax.Array, image_ids: jax.Array, num_images: int) -> jax.Array:
        config, batch = self.config, context.shape[0]
        # Random, not the reference's ones: equal latents stay equal for ever, and count as one.
        init = nn.with_logical_partitioning(nn.initializers.normal(config.hidden_size**-0.5), ("latents", "embed"))
        latents = self.param("latents", init, (config.resampler_n_latents, config.hidden_size)).astype(self.dtype)
        latents = jnp.tile(latents, (batch, num_images, 1))
        owners = jnp.repeat(jnp.arange(1, num_images + 1, dtype=jnp.int32), config.resampler_n_latents)
        owners = jnp.broadcast_to(owners, (batch, owners.shape[0]))
        visibility = Visibility(owners, jnp.concatenate([image_ids, owners], axis=1))
        layers = stack(Layer, length=config.resampler_depth, remat=self.remat)
        latents, _ = layers(config, self.dtype, name="layers")(latents, (context, visibility), None)
        latents = RMSNorm(config.rms_norm_eps, name="norm")(latents)
        return latents.reshape(batch, num_images, config.resampler_n_latents, config.hidden_size)


class PerceiverConnector(nn.Module):
    """Connector part: `(features, image_ids) -> latents`, with a static number of tokens an image."""

    config: Idefics2Config
    dtype: Dtype
    remat: str

    @property
    def num_tokens(self) -> int:
        return self.config.perceiver_config.resampler_n_latents

    @nn.compact
    def __call__(self, features: jax.Array, image_ids: jax.Array, num_images: int) -> jax.Array:
        """Resamples every image of every row to Q latents.

        Args:
          features: [B, V, S, E] from the vision part.
          image_ids: int32 [B, V, S], 1..num_images, 0 = padding.
          num_images: I, static.

        Returns:
          [B, I, Q, D]; meaningless for an image that no patch names.
        """
        text = self.config.text_config
        batch = features.shape[0]
        projection = GatedMLP(
            intermediate=text.intermediate_size,
            features=text.hidden_size,
            act=text.hidden_act,
            axes=("vision_embed", "embed"),
            std=(new_weight_std(text.hidden_size), new_weight_std(2 * text.hidden_size)),
            dtype=self.dtype,
            name="modality_projection",
        )
        context = projection(features.reshape(batch, -1, features.shape[-1]))
        resampler = Resampler(self.config.perceiver_config, self.dtype, self.remat, name="perceiver_resampler")
        return resampler(context, image_ids.reshape(batch, -1), num_images)
