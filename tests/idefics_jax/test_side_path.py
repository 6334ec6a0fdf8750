"""DoRA on the side path: PEFT's values and gradients, column norms without the column; dropout; noise on embeddings."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from idefics_jax.layers import Linear, shared_lora_a
from idefics_jax.param_transforms import lora
from idefics_jax.side_path import column_norms, neftune
from idefics_jax.stack import REMAT_POLICIES
from tests.idefics_jax import tiny

SIZE_IN, SIZE_OUT, RANK, ALPHA = 7, 5, 2, 6.0
LINEAR = Linear(SIZE_OUT, ("embed", "mlp"), 0.02, jnp.float32, use_bias=True)


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def reference():
    """PEFT's DoRA on a linear layer, with random weights everywhere."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(SIZE_IN, SIZE_OUT))
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.from_numpy(draw(RANK, SIZE_IN)))
        layer.lora_B["default"].weight.copy_(torch.from_numpy(draw(SIZE_OUT, RANK)))
        layer.lora_magnitude_vector["default"].weight.data.mul_(torch.from_numpy(1 + 0.3 * draw(SIZE_OUT)))
    return model, layer


def ours(layer):
    """The same weights as our variables: parameters, and adapters that are not yet scaled."""
    params = {"kernel": layer.base_layer.weight.detach().numpy().T, "bias": layer.base_layer.bias.detach().numpy()}
    adapters = {
        "lora_A": layer.lora_A["default"].weight.detach().numpy().T,
        "lora_B": layer.lora_B["default"].weight.detach().numpy().T,
        "lora_magnitude": layer.lora_magnitude_vector["default"].weight.detach().numpy(),
    }
    return params, adapters


def apply(params, adapters, x):
    scaled = {**adapters, "lora_B": adapters["lora_B"] * (ALPHA / RANK)}
    return LINEAR.apply({"params": params, "adapters": scaled}, x)


def test_dora_equals_peft_in_value_and_in_every_gradient():
    model, layer = reference()
    params, adapters = ours(layer)
    x, weight = draw(3, SIZE_IN), draw(3, SIZE_OUT)
    inputs = torch.from_numpy(x).requires_grad_()
    wanted = model(inputs)
    (wanted * torch.from_numpy(weight)).sum().backward()
    np.testing.assert_allclose(apply(params, adapters, x), wanted.detach(), atol=1e-5)

    gradients, of_x = jax.grad(lambda tree, y: jnp.sum(apply(params, tree, y) * weight), argnums=(0, 1))(adapters, x)
    np.testing.assert_allclose(of_x, inputs.grad, atol=1e-5)
    np.testing.assert_allclose(gradients["lora_A"], layer.lora_A["default"].weight.grad.T, atol=1e-4)
    np.testing.assert_allclose(gradients["lora_B"], layer.lora_B["default"].weight.grad.T, atol=1e-4)
    magnitude = layer.lora_magnitude_vector["default"].weight.grad
    np.testing.assert_allclose(gradients["lora_magnitude"], magnitude, atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
def test_column_norms_are_those_of_the_sum(quantized):
    kernel = np.round(draw(SIZE_IN, SIZE_OUT) * 40).astype(np.int8) if quantized else draw(SIZE_IN, SIZE_OUT)
    scale = np.abs(draw(SIZE_OUT)) * 0.1 if quantized else None
    lora_a, lora_b = draw(SIZE_IN, RANK), draw(RANK, SIZE_OUT)
    full = kernel * (1.0 if scale is None else scale) + lora_a @ lora_b
    found = column_norms(kernel, scale, jnp.asarray(lora_a), jnp.asarray(lora_b))
    np.testing.assert_allclose(found, np.linalg.norm(full, axis=0), rtol=1e-5)


def test_dropout_drops_from_the_side_path_alone_and_keeps_its_mean():
    kernel, x = np.zeros((SIZE_IN, SIZE_OUT), np.float32), np.ones((4000, SIZE_IN), np.float32)
    adapter = {"lora_A": np.ones((SIZE_IN, 1), np.float32), "lora_B": np.ones((1, SIZE_OUT), np.float32)}
    linear = Linear(SIZE_OUT, ("embed", "mlp"), 0.02, jnp.float32)

    def run(rngs, rate):
        leaves = {**adapter, "lora_dropout": np.float32(rate)}
        return np.asarray(linear.apply({"params": {"kernel": kernel}, "adapters": leaves}, x, rngs=rngs))

    np.testing.assert_array_equal(run(None, 0.25), np.full((4000, SIZE_OUT), SIZE_IN))
    dropped = run({"dropout": jax.random.key(0)}, 0.25)[:, 0]
    kept = dropped * 0.75
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-4, err_msg="each input is dropped whole or scaled up")
    np.testing.assert_allclose(dropped.mean(), SIZE_IN, rtol=0.02)
    np.testing.assert_allclose(kept.var(), SIZE_IN * 0.75 * 0.25, rtol=0.1)
    assert np.array_equal(run({"dropout": jax.random.key(0)}, 0.25)[:, 0], dropped)
    assert not np.array_equal(run({"dropout": jax.random.key(1)}, 0.25)[:, 0], dropped)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_the_policy_linear_keeps_spares_every_product_of_a_frozen_kernel(dora):
    linear = Linear(SIZE_OUT, ("embed", "mlp"), 0.02, jnp.float32)
    adapter = {"lora_A": jnp.ones((SIZE_IN, RANK)), "lora_B": jnp.ones((RANK, SIZE_OUT))}
    adapter |= {"lora_magnitude": jnp.ones(SIZE_OUT)} if dora else {}

    def loss(adapter, x, remat):
        def run(adapter, x):
            # Squared, so that the product itself is needed in the backward pass.
            y = linear.apply({"params": {"kernel": jnp.ones((SIZE_IN, SIZE_OUT))}, "adapters": adapter}, x)
            return jnp.sum(jnp.square(y))

        return jax.checkpoint(run, policy=REMAT_POLICIES[remat])(adapter, x)

    def products(remat):
        text = str(
            jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(adapter, jnp.ones((7, SIZE_IN)), remat)
        )
        # The frozen product is the only one that gives [7, out] from a sum over `in`.
        return len(re.findall(rf"f32\[7,{SIZE_OUT}\] = dot_general", text))

    into_out = 2  # x @ W and x_a @ B
    assert products("linear") == into_out
    assert products("full") == 2 * into_out


class Siblings(nn.Module):
    """Two Linears that read the same input, as q, k and v do."""

    @nn.compact
    def __call__(self, x):
        x_a = shared_lora_a(self, x, ("one", "two"))
        return [Linear(1, ("embed", "mlp"), 0.02, jnp.float32, name=name)(x, x_a.get(name)) for name in ("one", "two")]


@pytest.mark.parametrize("rates", [(0.25, 0.25), (0.25, 0.5), (0.25, 0.0)], ids=["equal", "unequal", "one"])
def test_siblings_share_a_mask_where_their_rates_are_equal(rates):
    adapter = {"lora_A": jnp.ones((SIZE_IN, 1)), "lora_B": jnp.ones((1, 1))}
    spec = [lora.LoraTarget(name, 1, 1.0, rate) for name, rate in zip(("block/one", "block/two"), rates, strict=True)]
    adapters = lora.with_dropout({"block": {"one": adapter, "two": adapter}}, spec)["block"]
    kernels = {name: {"kernel": jnp.zeros((SIZE_IN, 1))} for name in ("one", "two")}

    def run(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return Siblings().apply({"params": kernels, "adapters": adapters}, jnp.ones((4000, SIZE_IN)), rngs=rngs)

    one, two = run(0)
    assert np.array_equal(one, two) == (rates[0] == rates[1])
    for sums, rate in zip((one, two), rates, strict=True):
        np.testing.assert_allclose(sums.mean(), SIZE_IN, rtol=0.03)
        np.testing.assert_allclose(sums.var(), SIZE_IN * rate / (1 - rate), rtol=0.1, atol=1e-6)
    assert not np.array_equal(run(1)[0], one)


def test_training_noises_the_embeddings_that_the_decoder_reads():
    batch, variables = tiny.batch(0), {"params": tiny.params()}

    def embedded(model, **rngs):
        return np.asarray(model.apply(variables, batch, rngs=rngs, method="embed"))

    plain, model = embedded(tiny.MODEL), tiny.MODEL.clone(neftune_alpha=5.0)
    np.testing.assert_array_equal(embedded(model), plain)  # without a key, as in evaluation
    noise = np.abs(embedded(model, neftune=jax.random.key(0)) - plain)[:, :20]
    bound = 5.0 / np.sqrt(10 * tiny.CONFIG.text_config.hidden_size)  # documents of ten tokens
    assert 0.95 * bound < noise.max() <= 1.001 * bound


def test_noise_has_the_width_of_its_own_document():
    width, alpha = 64, 5.0
    segments = np.zeros((2, 100), np.int32)
    segments[0, :90], segments[0, 90:], segments[1, :10] = 1, 2, 1
    noise = neftune(jnp.zeros((2, 100, width)), jnp.asarray(segments), alpha, jax.random.key(0))
    for row, span, length in ((0, np.s_[:90], 90), (0, np.s_[90:], 10), (1, np.s_[:10], 10)):
        bound = alpha / np.sqrt(length * width)
        assert 0.95 * bound < np.abs(noise[row, span]).max() <= bound
