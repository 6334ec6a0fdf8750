"""Quantised kernels: half a step off at most, the same side path on top, never cast by accident."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idefics_jax import sharding
from idefics_jax.param_transforms import lora, partition, paths, quantize
from tests.idefics_jax import tiny

PATTERNS = ("text_model/layers/.*", "vision_model/encoder/.*")


def milder_params():
    """Those of every test at 0.7 of their size: at the whole, attention multiplies a product's rounding by ten."""
    return jax.tree.map(lambda x: 0.7 * x, tiny.params())


def test_each_weight_is_off_by_at_most_half_a_step():
    params = tiny.params()
    quantized = quantize.quantize(params, PATTERNS)
    back = paths.flatten(quantize.dequantize(quantized, jnp.float32))
    for path, kernel in paths.flatten(params).items():
        if f"{paths.parent(path)}/kernel_scale" in paths.flatten(quantized) and path.endswith("/kernel"):
            assert paths.flatten(quantized)[path].dtype == jnp.int8
            step = np.max(np.abs(kernel), axis=-2, keepdims=True) / 127
            assert np.all(np.abs(back[path] - kernel) <= 0.5001 * step), path
        else:
            assert back[path] is kernel


def test_the_model_reads_int8_as_the_same_weights_multiplied_out():
    quantized = quantize.quantize(milder_params(), PATTERNS)
    plain = tiny.logits({"params": quantize.dequantize(quantized, jnp.float32)}, tiny.batch(0))
    np.testing.assert_allclose(tiny.logits({"params": quantized}, tiny.batch(0)), plain, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_lie_on_a_quantised_kernel_as_on_any(dora):
    quantized = quantize.quantize(milder_params(), PATTERNS)
    base = quantize.dequantize(quantized, jnp.float32)
    spec = (lora.LoraTarget("text_model/layers/.*", rank=2, alpha=6.0, dora=dora),)
    adapters = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), lora.init(base, spec, jax.random.key(0))
    )
    found = tiny.logits({"params": quantized, "adapters": lora.scale(adapters, spec)}, tiny.batch(0))
    merged = tiny.logits({"params": lora.merge(base, adapters, spec)}, tiny.batch(0))
    np.testing.assert_allclose(found, merged, atol=1e-5 * float(jnp.max(jnp.abs(merged))))


def test_a_scale_lies_as_the_outputs_of_its_kernel():
    quantized = quantize.quantize(tiny.raw_params(), PATTERNS)
    axes = paths.flatten(quantize.axes(sharding.logical_axes(tiny.boxed_params()), quantized))
    assert axes["text_model/layers/mlp/up_proj/kernel_scale"] == ("layers", "mlp")
    assert axes["text_model/layers/mlp/up_proj/kernel"] == ("layers", "embed", "mlp")


def test_casting_the_frozen_base_leaves_int8_and_scales_alone():
    cast = paths.flatten(quantize.cast(quantize.quantize(tiny.params(), PATTERNS), jnp.bfloat16))
    assert cast["text_model/layers/mlp/up_proj/kernel"].dtype == jnp.int8
    assert cast["text_model/layers/mlp/up_proj/kernel_scale"].dtype == jnp.float32
    assert cast["text_model/norm/scale"].dtype == jnp.bfloat16


def test_a_column_of_zeros_stays_zero():
    tree = {"x": {"kernel": jnp.zeros((3, 2)).at[:, 1].set(2.0)}}
    back = quantize.dequantize(quantize.quantize(tree, ("x",)), jnp.float32)
    np.testing.assert_array_equal(back["x"]["kernel"], tree["x"]["kernel"])


@pytest.mark.parametrize("trains", ["text_model/layers/mlp/up_proj/kernel", "text_model/layers/.*"])
def test_a_pattern_that_matches_a_kernel_that_trains_is_an_error(trains):
    params = tiny.params()
    rules = (partition.Rule(trains, "trainable"), partition.Rule(".*", "frozen"))
    trained, frozen = partition.split(params, partition.choose(params, {}, rules))
    quantize.check_frozen(trained, frozen, ("vision_model/encoder/.*", "text_model/lm_head"))
    with pytest.raises(
        ValueError, match=r"'text_model/layers/\.\*' matches 'text_model/layers/.*', whose kernel trains"
    ):
        quantize.check_frozen(trained, frozen, ("text_model/layers/.*",))


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="quantize: 'nowhere' matches no parameter"):
        quantize.quantize(tiny.params(), ("nowhere",))
