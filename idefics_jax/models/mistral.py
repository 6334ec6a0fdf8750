"""Mistral decoder: grouped-query attention, rotary positions, sliding window, untied head (reference: MistralModel).

The contract of a language model here: `embed(tokens)`, `__call__(x, positions, segment_ids, cache)`, `logits(x)`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from idefics_jax.attention import Visibility, attend, rotary
from idefics_jax.cache import Cache, write
from idefics_jax.config import TextConfig
from idefics_jax.layers import Dtype, Embedding, GatedMLP, Linear, RMSNorm, shared_lora_a
from idefics_jax.sharding import constrain
from idefics_jax.stack import stack, unrolled


class Attention(nn.Module):
    """Causal self-attention; with a cache, new keys and values are written into it and all of it is attended to."""

    config: TextConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, shared: tuple, layer_cache: dict | None) -> tuple[jax.Array, dict | None]:
        config, (positions, visibility, index) = self.config, shared
        x_a = shared_lora_a(self, x, ("q_proj", "k_proj", "v_proj"))

        def project(name, heads, axis):
            width = heads * config.head_dim
            linear = Linear(width, ("embed", axis), config.initializer_range, self.dtype, name=name)
            y = linear(x, x_a.get(name))
            return y.reshape(*x.shape[:-1], heads, config.head_dim)

        query = rotary(project("q_proj", config.num_attention_heads, "heads"), positions, config.rope_theta)
        key = rotary(project("k_proj", config.num_key_value_heads, "kv_heads"), positions, config.rope_theta)
        value = project("v_proj", config.num_key_value_heads, "kv_heads")
        if layer_cache is not None:
            new = {"key": key.swapaxes(1, 2), "value": value.swapaxes(1, 2)}
            layer_cache = write(layer_cache, new, index, axis=2)
            key, value = layer_cache["key"].swapaxes(1, 2), layer_cache["value"].swapaxes(1, 2)
        y = attend(query, key, value, visibility).reshape(*x.shape[:-1], -1)
        o_proj = Linear(config.hidden_size, ("heads", "embed"), config.initializer_range, self.dtype, name="o_proj")
        return o_proj(y), layer_cache


class Layer(nn.Module):
    config: TextConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, shared: tuple, layer_cache: dict | None) -> tuple[jax.Array, dict | None]:
        config = self.config
        y = RMSNorm(config.rms_norm_eps, name="input_layernorm")(x)
        y, layer_cache = Attention(config, self.dtype, name="self_attn")(y, shared, layer_cache)
        x = x + y
        y = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")(x)
        mlp = GatedMLP(
            intermediate=config.intermediate_size,
            features=config.hidden_size,
            act=config.hidden_act,
            axes=("embed", "embed"),
            std=(config.initializer_range, config.initializer_range),
            dtype=self.dtype,
            name="mlp",
        )
        x = constrain(x + mlp(y), ("act_batch", "act_length", "act_embed"))
        return x, layer_cache


class Mistral(nn.Module):
    """Language-model part.

    Attributes:
      config: sizes.
      tie: whether the head is the embedding table (config.json's tie_word_embeddings).
      dtype: dtype of the arithmetic.
      remat: name in stack.REMAT_POLICIES.
      unroll: whether the layers run unrolled (stack.unrolled), on parameters and a cache cut apart, or scanned.
    """

    config: TextConfig
    tie: bool
    dtype: Dtype
    remat: str
    unroll: bool = False

    def setup(self):
        config = self.config
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            ("vocab", "embed"),
            config.initializer_range,
            self.dtype,
            untrained=config.pad_token_id,
        )
        length = config.num_hidden_layers
        layers = unrolled(Layer, length=length) if self.unroll else stack(Layer, length=length, remat=self.remat)
        self.layers = layers(config, self.dtype)
        self.norm = RMSNorm(config.rms_norm_eps)
        if not self.tie:
            # float32 whatever the dtype: bf16 logits of equal rank would tie, and their rounding spoils the loss.
            self.lm_head = Linear(config.vocab_size, ("embed", "vocab"), config.initializer_range, jnp.float32)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]."""
        return self.embed_tokens(tokens)

    def __call__(
        self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the decoder.

        Args:
          x: [B, T, D] embeddings.
          positions: int32 [B, T], from 0 within each document.
          segment_ids: int32 [B, T], 0 = padding; a token sees its own segment only.
          cache: keys and values so far (cache.py), or None.

        Returns:
          Normed hidden states [B, T, D], and the cache with these T tokens written in.
        """
        if cache is None:
            seen, index, per_layer = (segment_ids, positions), None, None
        else:
            tokens = write(
                cache["tokens"], {"segment_ids": segment_ids, "positions": positions}, cache["index"], axis=1
            )
            seen, index, per_layer = (tokens["segment_ids"], tokens["positions"]), cache["index"], cache["layers"]
        visibility = Visibility(segment_ids, seen[0], positions, seen[1], self.config.sliding_window)
        x, per_layer = self.layers(x, (positions, visibility, index), per_layer)
        if cache is not None:
            cache = {"layers": per_layer, "tokens": tokens, "index": index + x.shape[1]}
        return self.norm(x), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        if self.tie:
            return x.astype(jnp.float32) @ self.embed_tokens.table().astype(jnp.float32).T
        return self.lm_head(x)
