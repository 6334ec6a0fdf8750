"""Layers against torch's and the reference's, and what they do with dtypes and adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.idefics2.modeling_idefics2 import Idefics2MLP
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from idefics_jax.layers import ACTIVATIONS, Embedding, GatedMLP, LayerNorm, Linear, RMSNorm
from tests.idefics_jax.reference import LEAF, randomize

AXES = ("embed", "mlp")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_linear_is_torch_s():
    torch_linear = torch.nn.Linear(5, 7)
    kernel, bias = torch_linear.weight.detach().numpy().T, torch_linear.bias.detach().numpy()
    linear = Linear(7, AXES, 1.0, jnp.float32, use_bias=True)
    x = random(2, 3, 5)
    ours = linear.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(ours, torch_linear(torch.from_numpy(x)).detach(), rtol=LEAF, atol=LEAF)


def test_an_adapter_is_added_beside_the_kernel():
    kernel, a, b, x = random(5, 7), random(5, 2, seed=1), random(2, 7, seed=2), random(3, 5, seed=3)
    linear = Linear(7, AXES, 1.0, jnp.float32)
    ours = linear.apply({"params": {"kernel": kernel}, "adapters": {"lora_A": a, "lora_B": b}}, x)
    np.testing.assert_allclose(ours, x @ (kernel + a @ b), rtol=LEAF, atol=LEAF)


@pytest.mark.parametrize(
    "layer",
    [
        Linear(4, AXES, 1.0, jnp.bfloat16, use_bias=True),
        GatedMLP(6, 4, "silu", ("embed", "embed"), (1.0, 1.0), jnp.bfloat16),
        RMSNorm(1e-5),
        LayerNorm(1e-5, "embed"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_parameters_stay_float32_and_results_are_bf16(layer):
    x = jnp.ones((2, 4), jnp.bfloat16)
    result, variables = layer.init_with_output(jax.random.key(0), x)
    assert result.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_embedding_looks_up_rows():
    table = random(9, 3)
    embedding = Embedding(9, 3, ("vocab", "embed"), 1.0, jnp.float32)
    ids = np.array([[0, 8], [3, 3]])
    np.testing.assert_array_equal(embedding.apply({"params": {"embedding": table}}, ids), table[ids])


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["size one", "size of eps"])
def test_rms_norm_is_the_reference_s(scale):
    norm = MistralRMSNorm(6, eps=1e-5)
    randomize(norm)
    x = scale * random(2, 3, 6)
    ours = RMSNorm(1e-5).apply({"params": {"scale": norm.weight.detach().numpy()}}, x)
    np.testing.assert_allclose(ours, norm(torch.from_numpy(x)).detach(), rtol=LEAF, atol=LEAF)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 3.0), (1e-3, 0.0)], ids=["off centre", "size of eps"])
def test_layer_norm_is_torch_s(scale, offset):
    norm = torch.nn.LayerNorm(6, eps=1e-6)
    randomize(norm)
    x = scale * random(2, 3, 6) + np.float32(offset)
    params = {"scale": norm.weight.detach().numpy(), "bias": norm.bias.detach().numpy()}
    ours = LayerNorm(1e-6, "embed").apply({"params": params}, x)
    np.testing.assert_allclose(ours, norm(torch.from_numpy(x)).detach(), rtol=LEAF, atol=LEAF)


@pytest.mark.parametrize("norm", [RMSNorm(1e-5), LayerNorm(1e-5, "embed")], ids=["rms", "layer"])
def test_norms_round_bf16_once_at_the_end(norm):
    x = jnp.asarray(random(8, 50), jnp.bfloat16)
    params = {"scale": 1 + 0.1 * random(50), "bias": random(50, seed=1)}
    exact = norm.apply({"params": params}, x.astype(jnp.float32))
    np.testing.assert_array_equal(norm.apply({"params": params}, x), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_mlp_is_the_reference_s(act):
    mlp = Idefics2MLP(hidden_size=5, intermediate_size=8, output_size=6, hidden_act=act)
    randomize(mlp)
    params = {name: {"kernel": getattr(mlp, name).weight.detach().numpy().T} for name in PROJECTIONS}
    x = 3 * random(4, 5)
    ours = GatedMLP(8, 6, act, ("embed", "embed"), (1.0, 1.0), jnp.float32).apply({"params": params}, x)
    np.testing.assert_allclose(ours, mlp(torch.from_numpy(x)).detach(), rtol=LEAF, atol=LEAF)
