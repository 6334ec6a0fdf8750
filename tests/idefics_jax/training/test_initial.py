"""A run starts from pretrained parts or another run, at the sizes its config tells or not at all."""

import copy

import jax
import numpy as np
import pytest
import torch
import transformers
from etils import epath

from idefics_jax import sharding
from idefics_jax.convert.orbax import load_model, save_model
from idefics_jax.errors import UserError
from idefics_jax.param_transforms import paths, positions
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.initial import from_sections, initial_params, load_processor, model_config

EMBEDDING, HEAD = "text_model/embed_tokens/embedding", "text_model/lm_head/kernel"
OWN_POSITIONS, OWN_VOCABULARY = 5, 390


@pytest.fixture(scope="module")
def parts(small_values, tmp_path_factory):
    """A SigLIP and a Mistral of the small model's sizes, with fewer positions and a smaller vocabulary."""
    sections, folders = small_values["model"], {}
    vision = {**sections["vision_config"], "image_size": OWN_POSITIONS * 14 + 6}
    other = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = transformers.SiglipConfig(vision_config=vision, text_config=other)
    decoder = transformers.MistralConfig(
        **{**sections["text_config"], "vocab_size": OWN_VOCABULARY}, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2
    )
    for name, model in (
        ("vision_model", transformers.SiglipModel(tower)),
        ("text_model", transformers.MistralForCausalLM(decoder).to(torch.bfloat16)),
    ):
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture
def from_parts(values, parts):
    values["model"]["text_config"]["rms_norm_eps"] = 1e-5
    values["init_std"] = ()
    return {**values, "init_parts": parts, "resize_positions": True, "grow_vocabulary": "normal"}


def start(values):
    config = TrainConfig.from_config_dict(values)
    processor = load_processor(config)
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use_mesh(mesh, sharding.RULES[config.sharding]):
        sizes = model_config(config, processor)
        return sizes, processor, paths.flatten(initial_params(config, sizes, mesh))


def test_parts_are_fitted_and_the_rest_is_random(from_parts, parts, capsys):
    sizes, _, params = start(from_parts)
    said = capsys.readouterr().out
    assert f"vision_model from {parts['vision_model']}, left out: vision_model.head.* (11), text_model.* (" in said
    tower = transformers.SiglipModel.from_pretrained(parts["vision_model"]).vision_model.state_dict()
    decoder = transformers.MistralForCausalLM.from_pretrained(parts["text_model"]).state_dict()
    np.testing.assert_array_equal(
        params["vision_model/encoder/layers/mlp/fc1/kernel"][1], tower["encoder.layers.1.mlp.fc1.weight"].T
    )
    table = tower["embeddings.position_embedding.weight"].numpy()
    weights = positions.cubic_weights(OWN_POSITIONS, 8)
    wanted = np.einsum("ro,sp,ope->rse", weights, weights, table.reshape(OWN_POSITIONS, OWN_POSITIONS, -1))
    np.testing.assert_allclose(params[positions.TABLE], wanted.reshape(64, -1), atol=1e-5)
    for path, name in ((EMBEDDING, "model.embed_tokens.weight"), (HEAD, "lm_head.weight")):
        rows = np.asarray(params[path].T if path == HEAD else params[path], np.float32)
        assert len(rows) == sizes.text_config.vocab_size
        np.testing.assert_array_equal(rows[:OWN_VOCABULARY], decoder[name].float().numpy())
        assert abs(rows[OWN_VOCABULARY:].std() * 4 - 1) < 0.1  # 1 / sqrt(16)
    assert params[HEAD].dtype == "bfloat16"
    alone = {**from_parts, "init_parts": {}, "resize_positions": False, "grow_vocabulary": "none"}
    random = start(alone)[2]
    for path, leaf in params.items():
        assert leaf.shape == random[path].shape
        if path.startswith("connector/"):
            np.testing.assert_array_equal(leaf, random[path])


def test_one_part_may_come_alone(from_parts, parts):
    from_parts["init_parts"] = {"text_model": parts["text_model"]}
    _, _, params = start(from_parts)
    assert np.asarray(params[positions.TABLE]).std() > 0.1  # its own initialisation, not SigLIP's of 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_positions": False}, "have 5 positions a side and the model 8; set resize_positions"),
        (
            {"grow_vocabulary": "none"},
            "have 390 vocabulary rows and the model 512; set grow_vocabulary to one of normal",
        ),
        ({"grow_vocabulary": "zero"}, "grow_vocabulary is 'zero'; it must be one of none, normal, mean"),
        ({"init_parts": {"ears": "x"}}, "init_parts names 'ears'; the parts are vision_model, text_model"),
        ({"init_from": "x"}, "init_from holds every part already"),
        ({"image_rules": {"longest_edge": 10_000}}, "images.longest_edge is 10000"),
        ({"image_rules": {"longest": 1}}, "config.image_rules.longest is not a setting; did you mean 'longest_edge'"),
    ],
)
def test_what_does_not_fit_is_refused(from_parts, change, message):
    with pytest.raises(UserError, match=message):
        start({**from_parts, **change})


def test_a_part_that_computes_otherwise_is_refused(from_parts):
    """Nothing in the shapes tells of heads or of a norm's epsilon."""
    changed = copy.deepcopy(from_parts)
    changed["model"]["text_config"]["rms_norm_eps"] = 1e-6
    with pytest.raises(UserError, match=r"config.model \(text_config.rms_norm_eps: 1e-05 -> 1e-06\)"):
        start(changed)


@pytest.fixture(scope="module")
def pretrained(small_values, tmp_path_factory):
    """The model that a run on pairs alone leaves: no row for `<end_of_utterance>`, a table of its own."""
    values = copy.deepcopy(small_values)
    stage = values["data"]["stages"]["stage2"]
    stage["sources"] = {"pairs": stage["sources"]["pairs"]}
    values["model"]["text_config"]["vocab_size"] = 402
    values["model"]["vision_config"]["image_size"] = 5 * 14
    values["image_rules"] = {"longest_edge": 70, "positions_per_side": 5}
    sizes, processor, params = start(values)
    workdir = epath.Path(tmp_path_factory.mktemp("pretrained"))
    save_model(workdir / "model", paths.unflatten(params), sizes, processor)
    return workdir


def test_another_run_s_model_is_grown_to_the_processor(values, pretrained):
    values |= {"init_from": str(pretrained), "model": {}, "init_std": ()}
    sizes, processor, params = start({**values, "resize_positions": True, "grow_vocabulary": "mean"})
    assert (sizes.text_config.vocab_size, sizes.vision_config.positions_per_side) == (403, 8)
    assert processor.image_rules.positions_per_side == 8
    before = paths.flatten(load_model(pretrained / "model")[0])
    changed = {path for path, leaf in params.items() if leaf.shape != before[path].shape}
    assert changed == {EMBEDDING, HEAD, positions.TABLE}
    np.testing.assert_array_equal(params[EMBEDDING][:402], before[EMBEDDING])
    np.testing.assert_allclose(params[EMBEDDING][402], np.mean(before[EMBEDDING], axis=0), atol=1e-6)
    for path in set(params) - changed:
        np.testing.assert_array_equal(params[path], before[path], err_msg=path)


def test_a_model_without_the_row_that_conversations_need_is_refused(values, pretrained):
    values |= {"init_from": str(pretrained), "model": {}, "init_std": (), "resize_positions": True}
    with pytest.raises(UserError, match="text_config.vocab_size is 402 and must be 403.* .grow_vocabulary"):
        start(values)


def test_sizes_in_the_config_are_held_against_another_run_s(values, pretrained):
    values |= {"init_from": str(pretrained), "init_std": (), "resize_positions": True, "grow_vocabulary": "mean"}
    assert jax.tree.leaves(start(values)[2])[0].size
    values["model"]["text_config"]["num_hidden_layers"] = 3
    with pytest.raises(UserError, match=r"config.model \(text_config.num_hidden_layers: 2 -> 3\)"):
        start(values)


@pytest.mark.parametrize(
    ("section", "name", "message"),
    [
        ("text_config", "num_hidden_layer", "config.model.text_config.num_hidden_layer .* did you mean 'num_hidden_la"),
        ("text_config", "sliding_windw", "config.model.text_config.sliding_windw .* did you mean 'sliding_window'"),
        ("vision_config", "img_size", "config.model.vision_config.img_size .* did you mean 'image_size'"),
        (None, "perceiver_confg", "config.model.perceiver_confg is not a setting; did you mean 'perceiver_config'"),
    ],
)
def test_a_misspelt_size_is_refused_by_name(values, section, name, message):
    group = values["model"][section] if section else values["model"]
    group[name] = 8
    with pytest.raises(UserError, match=message):
        from_sections(TrainConfig.from_config_dict(values), image_token_id=1)


def test_a_model_without_a_decoder_is_refused_by_name(values):
    del values["model"]["text_config"]
    with pytest.raises(UserError, match="config.model.text_config is missing; add the sizes of the decoder"):
        from_sections(TrainConfig.from_config_dict(values), image_token_id=1)


def test_sections_of_a_config_json_that_are_read_without_a_field_are_allowed(values):
    values["model"]["text_config"] |= {"model_type": "mistral", "attention_dropout": 0.0}
    values["model"]["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    sizes = from_sections(TrainConfig.from_config_dict(values), image_token_id=1)
    assert sizes.text_config.rope_theta == 500.0
