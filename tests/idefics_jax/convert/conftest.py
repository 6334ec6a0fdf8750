"""A whole Hugging Face folder, tiny inside and with the released vocabulary, image rules and number of latents."""

from pathlib import Path

import jax
import numpy as np
import pytest

from idefics_jax.config import Idefics2Config, PerceiverConfig, TextConfig, VisionConfig
from idefics_jax.convert.hf_folder import SHARD_BYTES, write_hf_folder
from idefics_jax.convert.tree import param_shapes

CONFIG = Idefics2Config(
    vision_config=VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=980, patch_size=14
    ),
    perceiver_config=PerceiverConfig(
        hidden_size=16, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=8, num_key_value_heads=1
    ),
    text_config=TextConfig(
        vocab_size=32003,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
)


@pytest.fixture(scope="session")
def released_folder(tmp_path_factory, released) -> Path:
    """A random model with the released processor, as to-hf writes it."""
    path = tmp_path_factory.mktemp("released") / "hf"
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), param_shapes(CONFIG))
    write_hf_folder(path, params, CONFIG, released, generation_config=None, shard_bytes=SHARD_BYTES)
    return path
