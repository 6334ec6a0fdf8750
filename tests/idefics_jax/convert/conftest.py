"""A whole Hugging Face folder: the released config and processor, with layers that are few and small."""

from pathlib import Path

import jax
import numpy as np
import pytest

from idefics_jax.config import Idefics2Config
from idefics_jax.convert.hf_folder import SHARD_BYTES, write_hf_folder
from idefics_jax.param_tree import param_shapes
from tests.idefics_jax.convert.released import RELEASED_CONFIG

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
CONFIG = Idefics2Config.from_hf(
    {
        **RELEASED_CONFIG,
        "vision_config": {**RELEASED_CONFIG["vision_config"], **SMALL, "num_attention_heads": 2},
        "perceiver_config": {
            **RELEASED_CONFIG["perceiver_config"],
            "hidden_size": 16,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        "text_config": {
            **RELEASED_CONFIG["text_config"],
            **SMALL,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    }
)


@pytest.fixture(scope="session")
def released_folder(tmp_path_factory, released) -> Path:
    """A random model with the released processor, as to-hf writes it."""
    path = tmp_path_factory.mktemp("released") / "hf"
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), param_shapes(CONFIG))
    write_hf_folder(path, params, CONFIG, released, generation_config=None, shard_bytes=SHARD_BYTES)
    return path
