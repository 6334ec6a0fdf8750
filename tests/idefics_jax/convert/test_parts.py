"""SigLIP's and Mistral's own folders, saved by transformers, are read as parts of Idefics2."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from idefics_jax.config import ConfigError
from idefics_jax.convert.parts import open_part, read_sizes
from idefics_jax.errors import UserError
from idefics_jax.models.mistral import Mistral
from idefics_jax.models.siglip import Siglip
from idefics_jax.param_transforms.paths import unflatten
from tests.idefics_jax import reference

VISION = {key: value for key, value in reference.VISION.items() if key != "model_type"}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    text = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 3}
    text |= {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=text)).eval()
    reference.randomize(model)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    text = {**reference.TEXT, "vocab_size": 30}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**text, attn_implementation="eager")).eval()
    reference.randomize(model)
    model.save_pretrained(folder)
    return model, folder


def sizes(path, part):
    """A tiny model with the part at its own sizes."""
    section = {"vision_model": "vision_config", "text_model": "text_config"}[part]
    config = dataclasses.replace(reference.twin().config, image_token_id=1)
    return dataclasses.replace(config, **{section: read_sizes(path, part)})


def read(path, part):
    leaves, left_out = open_part(path, part, sizes(path, part))
    return unflatten(dict(leaves))[part], left_out


def test_a_siglip_folder_gives_the_vision_tower_that_transformers_has(siglip):
    model, folder = siglip
    params, left_out = read(folder, "vision_model")
    assert left_out == "vision_model.head.* (11), text_model.* (22), logit_scale, logit_bias"
    pixels = np.random.default_rng(0).standard_normal((1, 3, 40, 40), np.float32)
    with torch.no_grad():
        wanted = model.vision_model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    patches = pixels[0].reshape(3, 10, 4, 10, 4).transpose(1, 3, 2, 4, 0).reshape(1, 1, 100, 48)
    ids, positions = np.ones((1, 1, 100), np.int32), np.arange(100, dtype=np.int32)[None, None]
    vision = Siglip(read_sizes(folder, "vision_model"), np.float32, "none")
    features = jax.jit(vision.apply)({"params": params}, patches, ids, positions)
    np.testing.assert_allclose(features[0], wanted, atol=reference.LEAF)


def test_a_vision_tower_saved_alone_is_the_same(siglip, tmp_path):
    model, folder = siglip
    model.vision_model.save_pretrained(tmp_path)
    alone, left_out = read(tmp_path, "vision_model")
    assert left_out == "head.* (11)"
    jax.tree.map(np.testing.assert_array_equal, alone, read(folder, "vision_model")[0])


def test_a_mistral_folder_gives_the_decoder_that_transformers_has(mistral):
    model, folder = mistral
    params, left_out = read(folder, "text_model")
    assert left_out == ""
    tokens = np.random.default_rng(0).integers(0, 30, (2, 9))
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens)).logits.numpy()
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)

    def logits(text, tokens):
        hidden, _ = text(text.embed(tokens), positions, np.ones_like(positions), None)
        return text.logits(hidden)

    decoder = Mistral(read_sizes(folder, "text_model"), False, np.float32, "none")
    np.testing.assert_allclose(decoder.apply({"params": params}, tokens, method=logits), wanted, atol=reference.WHOLE)


def test_sizes_that_a_config_leaves_out_are_the_part_s_own_defaults(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {}}))
    default = transformers.SiglipVisionConfig()
    for field, value in dataclasses.asdict(read_sizes(tmp_path, "vision_model")).items():
        if field not in ("extra", "initializer_range"):
            assert value == getattr(default, field), field


def test_a_tensor_of_no_known_use_is_named(mistral, tmp_path):
    tensors = safetensors.numpy.load_file(mistral[1] / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((mistral[1] / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"unexpected \(1\): model.text_model.layers.0.self_attn.q_proj.bias"):
        read(tmp_path, "text_model")


def test_another_kind_of_model_is_refused(siglip):
    with pytest.raises(ConfigError, match="model_type 'siglip'; text_model can be read from mistral"):
        read_sizes(siglip[1], "text_model")
