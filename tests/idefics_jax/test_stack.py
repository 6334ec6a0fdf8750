"""The scanned stack: equal to a loop, the same under every remat policy, one program whatever the depth."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idefics_jax.batch import batch_spec
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.models.mistral import Mistral
from idefics_jax.param_tree import param_shapes
from idefics_jax.stack import REMAT_POLICIES, stack, unrolled, unrolled_params, unstack
from tests.idefics_jax import reference, tiny


class Affine(nn.Module):
    """x * w + shared + per_layer; gives back what it saw."""

    @nn.compact
    def __call__(self, x, shared, per_layer):
        w = self.param("w", nn.with_logical_partitioning(nn.initializers.normal(), ("embed",)), x.shape[-1:])
        return x * w + shared["bias"] + per_layer, x


def test_a_stack_is_its_layers_one_after_another():
    module = stack(Affine, length=3, remat="none")(name="layers")
    w = np.arange(1.0, 7.0).reshape(3, 2)
    per_layer = np.array([10.0, 20.0, 30.0])
    x, shared = np.array([1.0, -1.0]), {"bias": 0.5}
    out, seen = module.apply({"params": {"w": w}}, x, shared, per_layer)
    for layer in range(3):
        np.testing.assert_allclose(seen[layer], x, rtol=1e-6)
        x = x * w[layer] + 0.5 + per_layer[layer]
    np.testing.assert_allclose(out, x, rtol=1e-6)


def test_each_layer_draws_its_own_parameters_and_has_a_layers_axis():
    module = stack(Affine, length=3, remat="full")(name="layers")
    boxed = module.init(jax.random.key(0), jnp.ones(4), {"bias": 0.0}, jnp.zeros(3))["params"]["w"]
    assert boxed.names == ("layers", "embed")
    assert boxed.value.shape == (3, 4)
    assert len(np.unique(boxed.value)) == 12


def test_unrolled_is_scanned_on_parameters_cut_apart():
    w, per_layer = np.arange(1.0, 7.0).reshape(3, 2), np.array([10.0, 20.0, 30.0])
    x, shared = np.array([1.0, -1.0]), {"bias": 0.5}
    scanned, seen = stack(Affine, length=3, remat="none")().apply({"params": {"w": w}}, x, shared, per_layer)
    params = unrolled_params({"w": w})
    assert list(params) == ["0", "1", "2"]
    out, own = unrolled(Affine, length=3)().apply({"params": params}, x, shared, unstack(per_layer))
    np.testing.assert_allclose(out, scanned, rtol=1e-6)
    np.testing.assert_allclose(np.stack(own), seen, rtol=1e-6)


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="remat is 'some'; choose one of none, linear, attention, full"):
        stack(Affine, length=1, remat="some")


def test_every_policy_gives_the_same_values_and_gradients():
    config, rng = tiny.CONFIG.text_config, np.random.default_rng(0)
    shapes = param_shapes(tiny.CONFIG)["text_model"]
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes)
    x = rng.normal(size=(2, 9, config.hidden_size)).astype(np.float32)
    positions, segments = np.tile(np.arange(9), (2, 1)), np.ones((2, 9), np.int32)

    def loss(params, remat):
        decoder = Mistral(config, False, jnp.float32, remat)
        return jnp.sum(decoder.apply({"params": params}, x, positions, segments)[0] ** 2)

    compute = reference.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = compute(params, "none")
    for remat in sorted(set(REMAT_POLICIES) - {"none"}):
        other_value, other_grads = compute(params, remat)
        np.testing.assert_allclose(other_value, value, rtol=1e-6)
        reference.assert_same_grads(other_grads, grads, 1e-5)


def program(remat: str, depth: int) -> str:
    """The text of the gradient of the whole tiny model with `depth` layers in each of its stacks."""
    config = dataclasses.replace(
        tiny.CONFIG,
        vision_config=dataclasses.replace(tiny.CONFIG.vision_config, num_hidden_layers=depth),
        perceiver_config=dataclasses.replace(tiny.CONFIG.perceiver_config, resampler_depth=depth),
        text_config=dataclasses.replace(tiny.CONFIG.text_config, num_hidden_layers=depth),
    )
    model = Idefics2(config, remat=remat, vision_remat=remat)
    grad = jax.grad(lambda params, batch: jnp.sum(model.apply({"params": params}, batch)[0]))
    return jax.jit(grad).lower(param_shapes(config), batch_spec(tiny.SHAPE)).as_text()


def test_a_policy_that_keeps_less_computes_more():
    products = {remat: program(remat, 2).count("dot_general") for remat in REMAT_POLICIES}
    assert products["none"] < products["linear"] < products["full"]


def test_the_program_is_the_same_size_at_any_depth():
    """So compile time does not grow with depth: only array shapes and loop bounds differ."""
    assert program("full", 2).count("\n") == program("full", 9).count("\n")
