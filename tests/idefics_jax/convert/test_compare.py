import json
import sys

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from idefics_jax.config import Idefics2Config
from idefics_jax.convert.compare import compare, compare_logits, random_inputs
from idefics_jax.convert.hf import from_hf
from idefics_jax.convert.hf_folder import HfFolder
from idefics_jax.convert.orbax import save_model
from idefics_jax.errors import UserError
from tests.idefics_jax.convert import reference_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in both forms."""
    root = tmp_path_factory.mktemp("compare")
    reference_folder.save(root / "hf", dtype="float32", max_shard_size="5GB")
    config = Idefics2Config.load(root / "hf")
    save_model(root / "ours", from_hf(HfFolder(root / "hf"), config), config, None)
    return root


def run(hf, ours, *, images=(), prompt=None, seed=0, dtype="float32"):
    return compare(hf, ours, images=images, prompt=prompt, seed=seed, dtype=dtype)


def test_numbers_are_what_they_say():
    reference = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    ours = np.log([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    result = compare_logits(reference, ours, "float32")
    assert result.positions == 2
    assert result.max_abs == pytest.approx(np.log(2))
    assert result.largest_logit == pytest.approx(np.log(10))
    assert result.kl == pytest.approx(0.25 * np.log(2) / 2)
    assert result.top1 == 0.5
    assert not result.agrees


def test_bfloat16_tie_is_no_disagreement_but_float32_difference_is():
    reference, ours = np.array([[1.0, 1.0 - 2**-8]]), np.array([[1.0 - 2**-8, 1.0]])
    assert compare_logits(reference, ours, "bfloat16").top1 == 1
    assert compare_logits(reference, ours, "float32").top1 == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["hf", "ours"])
def test_converted_model_agrees_with_transformers(folders, dtype, form):
    result = run(folders / "hf", folders / form, seed=1, dtype=dtype)
    assert result.agrees, result
    assert result.positions > 30
    assert str(result).endswith("the two agree")


@pytest.mark.parametrize("part", ["vision_model", "connector", "text_model"])
def test_changed_part_is_found_out(folders, tmp_path, part):
    config = Idefics2Config.load(folders / "hf")
    params = from_hf(HfFolder(folders / "hf"), config)
    changed = {
        "vision_model": ("vision_model", "encoder", "layers", "self_attn", "k_proj", "kernel"),
        "connector": ("connector", "perceiver_resampler", "layers", "self_attn", "v_proj", "kernel"),
        "text_model": ("text_model", "layers", "post_attention_layernorm", "scale"),
    }[part]
    leaf = params
    for name in changed:
        leaf = leaf[name]
    leaf *= 1.01
    save_model(tmp_path / "ours", params, config, None)
    result = run(folders / "hf", tmp_path / "ours")
    assert not result.agrees
    assert "DIFFER" in str(result)


def test_given_image_and_prompt_are_compared(released_folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    result = run(released_folder, released_folder, images=[str(tmp_path / "a.png")] * 2, prompt="What is this?")
    assert result.agrees, result
    assert result.positions == 1 + (1 + 64 + 1 + 64 + 1) + 4


def test_image_that_is_none_is_named(released_folder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"%PDF-1.7")
    with pytest.raises(UserError, match="--image .*a.png"):
        run(released_folder, released_folder, images=[str(tmp_path / "a.png")])
    with pytest.raises(UserError, match="--image .*b.png"):
        run(released_folder, released_folder, images=[str(tmp_path / "b.png")])


def test_models_of_two_configs_are_not_compared(folders, tmp_path):
    config = json.loads((folders / "hf" / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-3
    (tmp_path / "model.safetensors").symlink_to(folders / "hf" / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="different configs"):
        run(folders / "hf", tmp_path)


def test_random_inputs_hold_every_kind_of_padding(folders):
    config = Idefics2Config.load(folders / "hf")
    inputs = random_inputs(config, 0)
    assert inputs["attention_mask"][1, 0] == 0 < inputs["attention_mask"][1, -1]
    assert not inputs["pixel_values"][1, 1].any()
    assert not inputs["pixel_attention_mask"][0].all()
    assert inputs["input_ids"].max() < config.text_config.vocab_size


def test_missing_torch_is_one_sentence(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="torch is not installed; pip install -r requirements-test.txt"):
        run(folders / "hf", folders / "ours")


def test_every_tolerance_counts():
    logits = np.zeros((1, 4))
    assert compare_logits(logits, logits + 0.5e-4, "float32").agrees
    assert not compare_logits(logits, logits + 2e-4, "float32").agrees
    assert compare_logits(100 + logits, 100 + logits + 2e-4, "float32").agrees
    assert compare_logits(logits, logits + 2e-4, "bfloat16").agrees
    assert jnp.finfo("bfloat16").eps == 2**-7
