"""LoRA and DoRA: the base model at first, scaled by alpha / rank, merged equals the side path, nothing unused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from torch import nn, no_grad, tensor

from idefics_jax import sharding
from idefics_jax.param_transforms import lora, paths
from tests.idefics_jax import tiny

SPEC = (
    lora.LoraTarget(r"text_model/layers/self_attn/[qv]_proj", rank=2, alpha=6.0),
    lora.LoraTarget(r"vision_model/encoder/layers/mlp/fc1", rank=3, alpha=1.5),
    lora.LoraTarget(r"connector/.*/(down|k)_proj", rank=2, alpha=1.0),
)


# Both kinds on one model.
DORA = (dataclasses.replace(SPEC[0], dora=True), SPEC[1], dataclasses.replace(SPEC[2], dora=True))
both_kinds = pytest.mark.parametrize("spec", [SPEC, DORA], ids=["lora", "dora"])


def random_adapters(params, spec):
    adapters = lora.init(params, spec, jax.random.key(3))

    def of_leaf(path, x):
        noise = 0.2 * jax.random.normal(jax.random.key(x.size), x.shape)
        return x + noise if path.endswith("magnitude") else noise

    return paths.map_paths(of_leaf, adapters)


def test_adapters_have_their_kernels_shapes_and_axes():
    params = tiny.raw_params()
    shapes = jax.eval_shape(lambda: lora.init(params, SPEC, jax.random.key(0)))
    axes = lora.axes(sharding.logical_axes(tiny.boxed_params()), shapes)
    found = {path: (leaf.shape, paths.flatten(axes)[path]) for path, leaf in paths.flatten(shapes).items()}
    assert found == {
        "text_model/layers/self_attn/q_proj/lora_A": ((2, 16, 2), ("layers", "embed", "rank")),
        "text_model/layers/self_attn/q_proj/lora_B": ((2, 2, 16), ("layers", "rank", "heads")),
        "text_model/layers/self_attn/v_proj/lora_A": ((2, 16, 2), ("layers", "embed", "rank")),
        "text_model/layers/self_attn/v_proj/lora_B": ((2, 2, 8), ("layers", "rank", "kv_heads")),
        "vision_model/encoder/layers/mlp/fc1/lora_A": ((2, 16, 3), ("layers", "vision_embed", "rank")),
        "vision_model/encoder/layers/mlp/fc1/lora_B": ((2, 3, 24), ("layers", "rank", "vision_mlp")),
        "connector/modality_projection/down_proj/lora_A": ((24, 2), ("mlp", "rank")),
        "connector/modality_projection/down_proj/lora_B": ((2, 16), ("rank", "embed")),
        "connector/perceiver_resampler/layers/self_attn/k_proj/lora_A": ((2, 16, 2), ("layers", "embed", "rank")),
        "connector/perceiver_resampler/layers/self_attn/k_proj/lora_B": ((2, 2, 8), ("layers", "rank", "kv_heads")),
        "connector/perceiver_resampler/layers/mlp/down_proj/lora_A": ((2, 64, 2), ("layers", "mlp", "rank")),
        "connector/perceiver_resampler/layers/mlp/down_proj/lora_B": ((2, 2, 16), ("layers", "rank", "embed")),
    }


def test_fresh_adapters_change_nothing():
    params, batch = tiny.params(), tiny.batch(1)
    plain = tiny.logits({"params": params}, batch)
    adapters = lora.scale(lora.init(params, SPEC, jax.random.key(0)), SPEC)
    assert jnp.array_equal(tiny.logits({"params": params, "adapters": adapters}, batch), plain)
    adapters = lora.scale(lora.init(params, DORA, jax.random.key(0)), DORA)
    # The norm that divides is not rounded as the magnitude that multiplies.
    limit = 1e-5 * np.abs(plain).max()
    np.testing.assert_allclose(tiny.logits({"params": params, "adapters": adapters}, batch), plain, atol=limit)


@both_kinds
def test_side_path_equals_merged_with_alpha_other_than_rank(spec):
    params, batch = tiny.params(), tiny.batch(1)
    adapters = random_adapters(params, spec)
    side = tiny.logits({"params": params, "adapters": lora.scale(adapters, spec)}, batch)
    merged = tiny.logits({"params": lora.merge(params, adapters, spec)}, batch)
    assert float(jnp.max(jnp.abs(side - tiny.logits({"params": params}, batch)))) > 0.1
    np.testing.assert_allclose(side, merged, atol=1e-5 * float(jnp.max(jnp.abs(merged))))


def test_gradient_of_the_side_path_is_that_of_the_merged_kernel():
    params, batch = tiny.params(), tiny.batch(1)
    adapters = random_adapters(params, SPEC)

    def through_side(tree):
        return jnp.mean(tiny.logits({"params": params, "adapters": lora.scale(tree, SPEC)}, batch) ** 2)

    def through_merge(tree):
        return jnp.mean(tiny.logits({"params": lora.merge(params, tree, SPEC)}, batch) ** 2)

    side, merged = jax.jit(jax.grad(through_side))(adapters), jax.jit(jax.grad(through_merge))(adapters)
    for path, leaf in paths.flatten(side).items():
        assert float(jnp.max(jnp.abs(leaf))) > 0, path
        scale = float(jnp.max(jnp.abs(leaf)))
        np.testing.assert_allclose(leaf / scale, paths.flatten(merged)[path] / scale, atol=1e-5, err_msg=path)


def test_equals_peft_on_the_same_linear():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(5, 7)).astype(np.float32), rng.normal(size=(3, 7)).astype(np.float32)
    reference = get_peft_model(
        nn.Sequential(nn.Linear(7, 5, bias=False)), LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    )
    adapters = {"0": {"lora_A": rng.normal(size=(7, 2)), "lora_B": rng.normal(size=(2, 5))}}
    adapters = jax.tree.map(lambda a: a.astype(np.float32), adapters)
    layer = reference.base_model.model[0]
    with no_grad():
        layer.base_layer.weight.copy_(tensor(weight))
        layer.lora_A["default"].weight.copy_(tensor(adapters["0"]["lora_A"].T))
        layer.lora_B["default"].weight.copy_(tensor(adapters["0"]["lora_B"].T))
        wanted = reference(tensor(x)).numpy()
    merged = lora.merge({"0": {"kernel": weight.T}}, adapters, (lora.LoraTarget("0", rank=2, alpha=6.0),))
    np.testing.assert_allclose(x @ np.asarray(merged["0"]["kernel"]), wanted, atol=1e-5)


@both_kinds
def test_unmerge_gives_the_base_back(spec):
    params = tiny.params()
    adapters = random_adapters(params, spec)
    norms = lora.column_norms(params, adapters, spec)
    back = lora.unmerge(lora.merge(params, adapters, spec), adapters, spec, norms)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, params)


def test_unmerging_dora_without_its_norms_is_an_error():
    params = tiny.params()
    adapters = random_adapters(params, DORA)
    with pytest.raises(ValueError, match="unmerging '.*' under DoRA needs its column_norms"):
        lora.unmerge(lora.merge(params, adapters, DORA), adapters, DORA, {})


def test_merged_kernels_keep_their_dtype_and_are_summed_in_float32():
    # bf16 has steps of 2 above 256. Of the addend, 1.001, it would leave 1, and that sum rounds down to even.
    params = {"x": {"kernel": jnp.full((2, 2), 256.0, jnp.bfloat16)}}
    spec = (lora.LoraTarget("x", rank=2, alpha=2.0),)
    adapters = {"x": {"lora_A": jnp.full((2, 2), 0.5), "lora_B": jnp.full((2, 2), 1.001)}}
    kernel = lora.merge(params, adapters, spec)["x"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel.astype(jnp.float32), 258.0)


def test_the_plan_of_adapters_needs_no_weights():
    shapes = jax.eval_shape(tiny.raw_params)
    plan = lora.init(shapes, DORA, jax.random.key(0))
    real = lora.init(tiny.raw_params(), DORA, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), plan, real)
    axes = paths.flatten(lora.axes(sharding.logical_axes(tiny.boxed_params()), plan))
    assert axes["text_model/layers/self_attn/q_proj/lora_magnitude"] == ("layers", "heads")


def test_a_starts_as_asked_for():
    params = {"x": {"kernel": jnp.zeros((400, 8))}}
    start = {
        name: np.asarray(
            lora.init(params, (lora.LoraTarget("x", 50, 1.0, init=name),), jax.random.key(0))["x"]["lora_A"]
        )
        for name in lora.INITS
    }
    np.testing.assert_allclose(start["gaussian"].std(), 1 / 50, rtol=0.02)
    assert 0.99 / 20 < np.abs(start["kaiming"]).max() <= 1 / 20
    np.testing.assert_allclose(start["kaiming"].std(), 1 / 20 / np.sqrt(3), rtol=0.02)


def test_every_target_must_match_a_kernel():
    with pytest.raises(ValueError, match="'text_model/layers/self_attn/qproj' matches no parameter"):
        lora.init(tiny.raw_params(), (lora.LoraTarget("text_model/layers/self_attn/qproj", 2, 2.0),), jax.random.key(0))


def test_of_several_targets_the_first_that_matches_decides_and_none_comes_twice():
    first, second = (lora.LoraTarget(r"text_model/layers/mlp/(up|down)_proj", rank, 1.0) for rank in (2, 4))
    general = dataclasses.replace(second, pattern="text_model/.*_proj")
    chosen = lora.targets(["text_model/layers/mlp/up_proj", "text_model/layers/mlp/gate_proj"], (first, general))
    assert {module: target.rank for module, target in chosen.items()} == {
        "text_model/layers/mlp/up_proj": 2,
        "text_model/layers/mlp/gate_proj": 4,
    }
    with pytest.raises(ValueError, match="lora: two targets have the same pattern"):
        lora.init(tiny.raw_params(), (first, second), jax.random.key(0))


def test_an_adapter_the_model_never_reads_is_an_error():
    params = tiny.params()
    adapters = lora.init(params, SPEC, jax.random.key(0))

    def run(tree):
        return tiny.logits({"params": params, "adapters": tree}, tiny.batch(0))

    lora.assert_used(run, adapters)
    stray = {
        **adapters,
        "text_model": {**adapters["text_model"], "norm": {"lora_A": jnp.ones(3), "lora_B": jnp.ones(3)}},
    }
    with pytest.raises(ValueError, match="never reads 'text_model/norm/lora_A'"):
        lora.assert_used(run, stray)


def test_merge_refuses_an_adapter_without_a_kernel():
    adapters = {"gone": {"lora_A": jnp.ones((2, 1)), "lora_B": jnp.ones((1, 2))}}
    with pytest.raises(ValueError, match="'gone' has no kernel"):
        lora.merge(tiny.raw_params(), adapters, (lora.LoraTarget("gone", 1, 1.0),))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("rank", True), ("alpha", float("nan")), ("alpha", -1.0), ("dropout", 1.0), ("init", "zeros")],
)
def test_impossible_targets_are_refused(field, value):
    with pytest.raises(ValueError, match=f"lora: {field} is .* for 'x'; it must "):
        lora.LoraTarget(**{"pattern": "x", "rank": 2, "alpha": 1.0, field: value})
