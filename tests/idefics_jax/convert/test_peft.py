"""Adapters to and from the real peft: equal logits both ways, equal gradients of DoRA, and refusals by name."""

import json
import re

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from idefics_jax.config import Idefics2Config
from idefics_jax.convert import hf
from idefics_jax.convert.peft import CONFIG, PREFIX, WEIGHTS, about, load_adapter, save_adapter
from idefics_jax.errors import UserError
from idefics_jax.param_transforms import lora, new_rows, partition, paths, quantize
from tests.idefics_jax import reference
from tests.idefics_jax.reference import WHOLE, assert_close

VOCAB = reference.VOCAB


def spec(dora):
    def target(pattern, rank, alpha):
        return lora.LoraTarget(pattern, rank, alpha, dropout=0.1, dora=dora)

    return (
        target("text_model/layers/self_attn/[qkvo]_proj", 2, 6.0),
        target("text_model/layers/mlp/.*", 3, 1.5),
        target("vision_model/encoder/.*", 2, 6.0),
        target("connector/perceiver_resampler/.*/q_proj", 1, 4.0),
    )


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    # Id 98 is one of the new rows; the others new are the image's own.
    first = reference.document(rng, 5, (8, 12), 4)
    first.tokens[-2] = 98
    return [first, reference.document(rng, 7, (12, 8), (4, 4), 3)]


def adapters_for(params, targets, rows=0):
    # Larger ones make a model so ill-conditioned that float32 is off by 1e-4 of float64, with either package.
    made = lora.init(params, targets, jax.random.key(0))

    def of_leaf(path, x):
        noise = 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
        return x * (1 + noise) if path.endswith("magnitude") else x + noise

    made = paths.map_paths(of_leaf, made)
    if not rows:
        return made
    return partition.combine(made, jax.tree.map(lambda x: x + 0.5, new_rows.init(params, rows)))


def merged_logits(twin, params, documents):
    batch = reference.batch([[document] for document in documents])
    return reference.per_document(batch, reference.apply(twin.model, params, batch))


def peft_logits(twin, folder, documents, *, base=None):
    """The logits of the real peft with a folder's adapter on a base, or a fresh copy of the twin's reference."""
    model = peft.PeftModel.from_pretrained(base or reference.twin().hf, folder).eval()
    inputs = reference.hf_inputs(documents)
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    return [row[mask == 1] for row, mask in zip(logits, inputs["attention_mask"].numpy(), strict=True)]


@pytest.fixture(scope="module")
def twin():
    return reference.twin()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_loads_what_we_write_and_we_load_it_back(twin, documents, dora, tmp_path):
    adapters = adapters_for(twin.params, spec(dora), rows=3)
    save_adapter(tmp_path / "a", adapters, spec(dora), {}, twin.params, twin.config, base="somewhere")
    merged = new_rows.merge(lora.merge(twin.params, adapters, spec(dora)), adapters)
    ours = merged_logits(twin, merged, documents)
    assert np.abs(ours[0] - merged_logits(twin, twin.params, documents)[0]).max() > 0.1
    assert_close(ours, peft_logits(twin, tmp_path / "a", documents), WHOLE)

    back = load_adapter(tmp_path / "a", twin.config)
    for path, leaf in paths.flatten(adapters).items():
        np.testing.assert_array_equal(paths.flatten(back.adapters)[path], leaf, err_msg=path)
    assert len(paths.flatten(back.adapters)) == len(paths.flatten(adapters))
    jax.tree.map(np.testing.assert_array_equal, back.merge(twin.params), merged)


def test_a_head_with_lora_and_new_rows_is_written_whole(twin, documents, tmp_path):
    """As the recipes train it; PEFT knows one or the other of a module."""
    targets = (*spec(True)[:1], lora.LoraTarget("text_model/lm_head", 2, 3.0, dora=True))
    adapters = adapters_for(twin.params, targets, rows=3)
    save_adapter(tmp_path, adapters, targets, {}, twin.params, twin.config, base="somewhere")
    merged = new_rows.merge(lora.merge(twin.params, adapters, targets), adapters)
    assert_close(merged_logits(twin, merged, documents), peft_logits(twin, tmp_path, documents), WHOLE)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert (settings["modules_to_save"], list(settings["trainable_token_indices"])) == (["lm_head"], ["embed_tokens"])
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path, twin.config).merge(twin.params), merged)


def test_lora_beside_dora_is_written_as_dora_that_changes_nothing(twin, documents, tmp_path):
    targets = (*spec(True)[:1], *spec(False)[1:3], lora.LoraTarget("text_model/lm_head", 2, 3.0))
    adapters = adapters_for(twin.params, targets)
    held = quantize.quantize(twin.params, ("text_model/layers/mlp/(up|down)_proj",))
    save_adapter(tmp_path, adapters, targets, {}, held, twin.config, base="somewhere")
    merged = lora.merge(quantize.dequantize(held, "f4"), adapters, targets)
    own = load_adapter(tmp_path, twin.config).merge(quantize.dequantize(held, "f4"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), own, merged)
    base = reference.twin().hf
    base.load_state_dict(
        {n: torch.from_numpy(x) for n, x in hf.to_hf(quantize.dequantize(held, "f4"), twin.config).items()}
    )
    assert_close(merged_logits(twin, merged, documents), peft_logits(twin, tmp_path, documents, base=base), WHOLE)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_we_load_what_peft_writes_of_layers_and_rows_that_differ(twin, documents, dora, tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        use_dora=dora,
        init_lora_weights=False,
        target_modules=r".*text_model\.layers\.(0\.self_attn\.q_proj|\d\.self_attn\.v_proj|1\.mlp\.\w+_proj)",
        rank_pattern={r"layers\.0\.self_attn\.v_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.v_proj": 7},
        trainable_token_indices={"embed_tokens": [7, 5, 98], "lm_head": [96, 97, 98]},
    )
    model = peft.get_peft_model(reference.twin().hf, config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "trainable_tokens_delta" in name or "magnitude" in name:
                weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, twin.config)
    assert [target.rank for target in adapter.spec if "v_proj" in target.pattern] == [4]
    assert (list(adapter.rows), adapter.rows["text_model/embed_tokens"][0]) == (["text_model/embed_tokens"], [7, 5, 98])
    theirs = peft_logits(twin, tmp_path, documents)
    assert_close(merged_logits(twin, adapter.merge(twin.params), documents), theirs, WHOLE)


@pytest.mark.parametrize(("dora", "rslora"), [(False, True), (True, False)], ids=["rslora", "dora"])
def test_we_load_what_peft_writes(twin, documents, dora, rslora, tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        use_dora=dora,
        use_rslora=rslora,
        init_lora_weights=False,
        target_modules=["q_proj", "down_proj", "fc1"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"text_model\.layers\.\d+\.mlp\.down_proj": 7},
        modules_to_save=["lm_head"],
    )
    model = peft.get_peft_model(reference.twin().hf, config).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    inputs = reference.hf_inputs(documents)
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    theirs = [row[mask == 1] for row, mask in zip(logits, inputs["attention_mask"].numpy(), strict=True)]
    adapter = load_adapter(tmp_path, twin.config)
    assert_close(merged_logits(twin, adapter.merge(twin.params), documents), theirs, WHOLE)


def test_a_head_that_peft_adapted_is_read_with_what_lies_under_it(twin, documents, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(reference.twin().hf, config).eval()
    model.save_pretrained(tmp_path)
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    adapter = load_adapter(tmp_path, twin.config)
    theirs = peft_logits(twin, tmp_path, documents)
    assert_close(merged_logits(twin, adapter.merge(twin.params), documents), theirs, WHOLE)


def test_an_adapter_that_changed_its_base_is_read_once_peft_has_converted_it(twin, documents, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(reference.twin().hf, config).eval()
    model.peft_config["default"].init_lora_weights = True  # as peft's own recipe saves the start
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
        inputs = reference.hf_inputs(documents)
        logits = model(**inputs).logits.numpy()
    theirs = [row[mask == 1] for row, mask in zip(logits, inputs["attention_mask"].numpy(), strict=True)]
    model.save_pretrained(tmp_path / "moved")
    with pytest.raises(UserError, match="init_lora_weights is 'pissa', which changes the base model too"):
        load_adapter(tmp_path / "moved", twin.config)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    adapter = load_adapter(tmp_path / "plain", twin.config)
    assert_close(merged_logits(twin, adapter.merge(twin.params), documents), theirs, WHOLE)


def test_an_adapter_without_new_rows_fits_its_base_as_it_is(twin, tmp_path):
    targets = spec(False)[:1]
    save_adapter(tmp_path, adapters_for(twin.params, targets), targets, {}, twin.params, twin.config, base=None)
    assert about(tmp_path) == f"wrote {tmp_path}"


def test_an_adapter_with_new_rows_tells_that_its_base_must_be_grown(twin, documents, tmp_path):
    targets = spec(False)[:1]
    adapters = adapters_for(twin.params, targets, rows=1)
    save_adapter(tmp_path, adapters, targets, {}, twin.params, twin.config, base=None)
    mend = rf"model\.resize_token_embeddings\({VOCAB}\)"
    assert re.search(mend, about(tmp_path))
    small = reference.twin().hf
    small.resize_token_embeddings(VOCAB - 1)
    config = Idefics2Config.from_hf(small.config.to_dict())
    with pytest.raises(
        UserError, match=f"trains the rows {VOCAB - 1} to {VOCAB - 1} .* base has {VOCAB - 1}; .*{mend}"
    ):
        load_adapter(tmp_path, config)
    small.resize_token_embeddings(VOCAB)
    ours = merged_logits(twin, load_adapter(tmp_path, twin.config).merge(twin.params), documents)
    assert_close(ours, peft_logits(twin, tmp_path, documents, base=small), WHOLE)


def test_a_part_trained_in_full_is_saved_whole(twin, documents, tmp_path):
    targets = spec(False)[:3]
    adapters = adapters_for(twin.params, targets)
    trained = {"connector": jax.tree.map(lambda x: 0.9 * x, twin.params["connector"])}
    params = {**twin.params, **trained}
    only_projection = {"connector": {"modality_projection": trained["connector"]["modality_projection"]}}
    with pytest.raises(UserError, match="'text_model/norm/scale' trained .* no module that PEFT can save"):
        save_adapter(
            tmp_path, adapters, targets, {"text_model": {"norm": {"scale": 1}}}, params, twin.config, base=None
        )
    save_adapter(tmp_path / "a", adapters, targets, trained, params, twin.config, base=None)
    ours = merged_logits(twin, lora.merge(params, adapters, targets), documents)
    assert_close(ours, peft_logits(twin, tmp_path / "a", documents), WHOLE)
    save_adapter(tmp_path / "b", adapters, targets, only_projection, params, twin.config, base=None)
    saved = {name for name in load_file(tmp_path / "b" / WEIGHTS) if "lora" not in name}
    assert saved == {f"{PREFIX}model.connector.modality_projection.{x}_proj.weight" for x in ("gate", "up", "down")}


def test_a_quantised_part_is_saved_multiplied_out(twin, documents, tmp_path):
    targets = spec(False)[:1]
    adapters = adapters_for(twin.params, targets)
    projection = {"connector": {"modality_projection": {"gate_proj": {"kernel": 1}}}}
    params = quantize.quantize(
        twin.params, ("connector/modality_projection/(up|down)_proj", "text_model/layers/mlp/.*")
    )
    save_adapter(tmp_path / "a", adapters, targets, projection, params, twin.config, base=None)
    held = quantize.dequantize(quantize.quantize(twin.params, ("connector/modality_projection/(up|down)_proj",)), "f4")
    ours = merged_logits(twin, lora.merge(held, adapters, targets), documents)
    assert_close(ours, peft_logits(twin, tmp_path / "a", documents), WHOLE)


def test_gradients_of_dora_equal_pefts_through_the_whole_model(twin, documents, tmp_path):
    targets = spec(True)
    adapters = adapters_for(twin.params, targets)
    save_adapter(tmp_path / "a", adapters, targets, {}, twin.params, twin.config, base=None)
    model = peft.PeftModel.from_pretrained(reference.twin().hf, tmp_path / "a", is_trainable=True).eval()
    inputs = reference.hf_inputs(documents)
    logits = model(**inputs).logits
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=logits.shape).astype(np.float32))
    (logits * weight * inputs["attention_mask"][..., None]).sum().backward()
    grads = {
        name.replace(".default", "").removesuffix(".weight" if "magnitude" in name else ""): x.grad.numpy()
        for name, x in model.named_parameters()
        if x.requires_grad
    }
    save_file({name: np.ascontiguousarray(grad) for name, grad in grads.items()}, tmp_path / "a" / WEIGHTS)
    theirs = paths.flatten(load_adapter(tmp_path / "a", twin.config).adapters)

    batch = reference.batch([[document] for document in documents])
    weights = np.zeros((*batch["tokens"].shape, VOCAB), np.float32)
    for row, document in enumerate(documents):
        weights[row, : len(document.tokens)] = weight[row, : len(document.tokens)]

    def value(tree):
        variables = {"params": twin.params, "adapters": lora.scale(tree, targets)}
        return jax.numpy.sum(twin.model.apply(variables, batch, method="full_logits") * weights)

    for path, grad in paths.flatten(reference.jit(jax.grad(value))(adapters)).items():
        np.testing.assert_allclose(grad, theirs[path], atol=1e-4 * np.abs(theirs[path]).max(), err_msg=path)


def change_settings(folder, **changes):
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**settings, **changes}))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


Q = f"{PREFIX}model.text_model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_settings(f, peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
        (lambda f: change_settings(f, bias="all"), "bias is 'all', which is not supported"),
        (lambda f: change_settings(f, use_qalora=True), "use_qalora is True, which is not supported"),
        (
            lambda f: change_settings(f, init_lora_weights="pissa_niter_16"),
            "init_lora_weights is 'pissa_niter_16', which changes the base model too; .*path_initial_model",
        ),
        (lambda f: change_settings(f, r=0), "r is 0; it must be a positive number"),
        (lambda f: change_settings(f, r=3), "rank is 2 where adapter_config.json says 3; the two files"),
        (lambda f: change_settings(f, rank_pattern={"q_proj": 5}), "rank is 2 where .* says 5"),
        (lambda f: change_settings(f, lora_alpha=float("inf")), "lora_alpha is inf; it must be a positive number"),
        (lambda f: change_settings(f, use_dora="yes"), "use_dora is 'yes'; it must be true or false"),
        (lambda f: change_settings(f, lora_dropout="x"), "lora_dropout is 'x'; it must be a number from 0 to below 1"),
        (lambda f: change_settings(f, alpha_pattern=[1]), r"alpha_pattern is \[1\]; it must give a number to each"),
        (lambda f: change_settings(f, alpha_pattern={"(": 3}), r"alpha_pattern has '\(', which is not a regular expr"),
        (lambda f: change_settings(f, alpha_pattern={".*": "x"}), "gives '.*' 'x'; it must be a positive number"),
        (lambda f: (f / CONFIG).write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / CONFIG).write_text("[1]"), "holds a list and no settings"),
        (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors; .*pickles are not read"),
        (lambda f: change_tensors(f, lambda t: t.pop(f"{Q}.lora_B.weight")), "lacks .*layers.1.*q_proj.lora_B.weight"),
        (
            lambda f: change_tensors(f, lambda t: t.update({f"{Q}.lora_B.weight": np.zeros((3, 2), np.float32)})),
            r"q_proj.lora_B.weight is \[3, 2\] and should be \[48, 2\]",
        ),
        (
            lambda f: change_tensors(f, lambda t: t.update(stray=np.zeros(1, np.float32))),
            "1 tensors that belong to no module of this model, or to part of one: stray",
        ),
        (
            lambda f: change_settings(f, trainable_token_indices={"embed_tokens": [1, 2, 2], "lm_head": [96, 97, 98]}),
            r"embed_tokens are \[1, 2, 2\]; they must be 3 different ids",
        ),
        (
            lambda f: change_settings(f, trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [96, 97, 98]}),
            r"embed_tokens are \[1, 2\]; they must be 3 different ids",
        ),
        (lambda f: change_settings(f, trainable_token_indices=None), "embed_tokens are None; they must be 3 different"),
    ],
)
def test_a_folder_that_is_not_right_is_named(twin, damage, message, tmp_path):
    targets = spec(False)
    save_adapter(tmp_path / "a", adapters_for(twin.params, targets, 3), targets, {}, twin.params, twin.config, base="")
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path / "a", twin.config)


def test_what_peft_has_no_words_for_is_refused_by_name(twin, tmp_path):
    patches = (lora.LoraTarget("vision_model/embeddings/.*", 2, 1.0),)
    for targets, rows, message in (
        (patches, 0, "'vision_model/embeddings/patch_embedding' is on a convolution"),
        ((), 3, "there are no LoRA adapters"),
    ):
        adapters = adapters_for(twin.params, targets, rows)
        with pytest.raises(UserError, match=message):
            save_adapter(tmp_path / "a", adapters, targets, {}, twin.params, twin.config, base=None)
        assert not (tmp_path / "a").exists()


def test_layers_without_an_adapter_get_one_that_adds_nothing(twin, documents, tmp_path):
    targets = spec(False)[:2]
    save_adapter(tmp_path, adapters_for(twin.params, targets), targets, {}, twin.params, twin.config, base=None)
    change_tensors(tmp_path, lambda t: [t.pop(name) for name in list(t) if ".layers.0." in name])
    adapter = load_adapter(tmp_path, twin.config)
    ours = merged_logits(twin, adapter.merge(twin.params), documents)
    assert hf.to_hf(adapter.merge(twin.params), twin.config).keys() == hf.to_hf(twin.params, twin.config).keys()
    regex = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    change_settings(tmp_path, target_modules=regex.replace(r"\d+", "1"))
    assert_close(ours, peft_logits(twin, tmp_path, documents), WHOLE)
