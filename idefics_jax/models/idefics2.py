"""Idefics2, fully autoregressive: vision, connector and decoder, merged at the `<image>` tokens.

Reference: Idefics2ForConditionalGeneration; paper, section 3.1. Shapes of a batch: idefics_jax/batch.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from idefics_jax.batch import Batch
from idefics_jax.cache import Cache
from idefics_jax.config import Idefics2Config
from idefics_jax.layers import Dtype
from idefics_jax.models.mistral import Mistral
from idefics_jax.models.perceiver import PerceiverConnector
from idefics_jax.models.siglip import Siglip
from idefics_jax.sharding import constrain
from idefics_jax.side_path import neftune


def merge(x: jax.Array, latents: jax.Array, is_image: jax.Array) -> jax.Array:
    """Puts the k-th latent of a row in the place of its k-th `<image>` token.

    Args:
      x: [B, T, D] token embeddings.
      latents: [B, I, Q, D].
      is_image: bool [B, T].

    Returns:
      [B, T, D]. A gather within each row: no dynamic shape, no traffic between devices.
    """
    latents = latents.reshape(latents.shape[0], -1, latents.shape[-1])
    order = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, latents.shape[1] - 1)
    taken = jnp.take_along_axis(latents, order[:, :, None], axis=1)
    return jnp.where(is_image[:, :, None], taken.astype(x.dtype), x)


class Idefics2(nn.Module):
    """The whole model.

    Attributes:
      config: sizes.
      dtype: dtype of the arithmetic; parameters keep their own.
      remat: what the backward pass keeps of the decoder, a name in stack.REMAT_POLICIES.
      vision_remat: and of the vision encoder and the connector.
      unroll: whether the decoder's layers run unrolled, as generate does for a token at a time.
      neftune_alpha: strength of the noise on embeddings, where the caller gives a "neftune" key; 0 for none.
    """

    config: Idefics2Config
    dtype: Dtype = jnp.float32
    remat: str = "none"
    vision_remat: str = "none"
    unroll: bool = False
    neftune_alpha: float = 0.0

    def setup(self):
        config = self.config
        self.vision_model = Siglip(config.vision_config, self.dtype, self.vision_remat)
        self.connector = PerceiverConnector(config, self.dtype, self.vision_remat)
        text, tie = config.text_config, config.tie_word_embeddings
        self.text_model = Mistral(text, tie, self.dtype, self.remat, self.unroll)

    @property
    def head(self) -> str:
        """The submodule of the text model whose variables `logits` reads."""
        return "embed_tokens" if self.config.tie_word_embeddings else "lm_head"

    def embed_images(self, batch: Batch) -> jax.Array:
        """Returns the latents [B, I, Q, D] of a batch's images."""
        ids = batch["patch_image_ids"]
        features = self.vision_model(batch["patches"], ids, batch["patch_positions"])
        return self.connector(features, ids, batch["image_mask"].shape[1])

    def embed(self, batch: Batch) -> jax.Array:
        """Returns the decoder's input [B, T, D]; a batch without `patches` is text only."""
        x = self.text_model.embed(batch["tokens"])
        if "patches" in batch:
            x = merge(x, self.embed_images(batch), batch["tokens"] == self.config.image_token_id)
        if self.neftune_alpha and self.has_rng("neftune"):
            x = neftune(x, batch["segment_ids"], self.neftune_alpha, self.make_rng("neftune"))
        return constrain(x, ("act_batch", "act_length", "act_embed"))

    def __call__(self, batch: Batch, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """Returns the decoder's normed hidden states [B, T, D], and the cache with the batch's tokens written in."""
        return self.text_model(self.embed(batch), batch["positions"], batch["segment_ids"], cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return self.text_model.logits(hidden)

    def full_logits(self, batch: Batch) -> jax.Array:
        """Returns float32 [B, T, V]: for comparison and small inputs; training uses the chunked loss instead."""
        return self.logits(self(batch)[0])
