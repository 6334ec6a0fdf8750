"""A model small enough for every test, and batches for it."""

import functools

import jax
import numpy as np

from idefics_jax import sharding
from idefics_jax.batch import BatchShape, batch_spec, empty_batch
from idefics_jax.config import Idefics2Config, PerceiverConfig, TextConfig, VisionConfig
from idefics_jax.models.idefics2 import Idefics2

LATENTS = 2
IMAGE_TOKEN = 62
SHAPE = BatchShape(rows=4, tokens=24, vision_rows=1, patches=16, images=2, patch_dim=48)

CONFIG = Idefics2Config(
    vision_config=VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    ),
    perceiver_config=PerceiverConfig(
        hidden_size=16,
        resampler_n_latents=LATENTS,
        resampler_depth=2,
        resampler_n_heads=2,
        resampler_head_dim=8,
        num_key_value_heads=1,
    ),
    text_config=TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=None,
    ),
    image_token_id=IMAGE_TOKEN,
)
MODEL = Idefics2(CONFIG)


def batch(seed: int) -> dict[str, np.ndarray]:
    """Two documents a row, each with an image of 2 x 4 patches before its words."""
    rng = np.random.default_rng(seed)
    arrays = empty_batch(SHAPE)
    arrays["tokens"][:] = rng.integers(3, 60, arrays["tokens"].shape)
    arrays["segment_ids"][:, :20] = np.repeat([1, 2], 10)
    arrays["positions"][:, :20] = np.tile(np.arange(10), 2)
    for start in (0, 10):
        arrays["tokens"][:, start + 1 : start + 1 + LATENTS] = IMAGE_TOKEN
        arrays["loss_weights"][:, start + 2 : start + 9] = 1
    arrays["patches"][:] = rng.integers(0, 256, arrays["patches"].shape)
    arrays["patch_image_ids"][:] = np.repeat([1, 2], 8)
    arrays["patch_positions"][:] = np.tile(np.arange(8), 2)
    arrays["image_mask"][:] = 1
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in batch_spec(SHAPE).items()
    }
    return arrays


@functools.cache
def boxed_params():
    init = jax.jit(functools.partial(MODEL.init, method=Idefics2.full_logits))
    return init(jax.random.key(0), batch(0))["params"]


def params():
    """Random parameters, large enough that every one of them matters."""
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), raw_params())


def raw_params():
    return sharding.unbox(boxed_params())


@jax.jit
def logits(variables, arrays):
    return MODEL.apply(variables, arrays, method=Idefics2.full_logits)
