"""The chunked loss equals the plain one, in value and gradient, and never forms [B, T, V]."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idefics_jax.training.losses import next_token_loss

B, T, D, V = 3, 20, 8, 37


def inputs():
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    tokens = rng.integers(0, V, (B, T))
    weights = rng.uniform(size=(B, T)) * (rng.uniform(size=(B, T)) < 0.7)
    weights[:, -1] = 0
    return (jnp.asarray(x, jnp.float32) for x in (hidden, kernel, weights)), jnp.asarray(tokens, jnp.int32)


def chunked(hidden, kernel, weights, tokens, chunk):
    return next_token_loss(hidden, tokens, weights, kernel, lambda head, x, *_: x @ head, chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
def test_equals_the_plain_loss_with_its_gradient(chunk):
    (hidden, kernel, weights), tokens = inputs()

    def plain(hidden, kernel):
        losses = optax.softmax_cross_entropy_with_integer_labels((hidden @ kernel)[:, :-1], tokens[:, 1:])
        return jnp.sum(losses * weights[:, :-1])

    wanted, wanted_grads = jax.value_and_grad(plain, (0, 1))(hidden, kernel)
    sums = chunked(hidden, kernel, weights, tokens, chunk)
    grads = jax.grad(lambda h, k: chunked(h, k, weights, tokens, chunk)["loss"], (0, 1))(hidden, kernel)
    np.testing.assert_allclose(sums["loss"], wanted, rtol=1e-5)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(grad, wanted_grad, atol=1e-5)
    hits = jnp.argmax((hidden @ kernel)[:, :-1], -1) == tokens[:, 1:]
    np.testing.assert_allclose(sums["correct"], jnp.sum(hits * weights[:, :-1]), rtol=1e-5)
    np.testing.assert_allclose(sums["weight"], jnp.sum(weights), rtol=1e-5)


def test_a_head_is_told_which_chunk_of_which_row_it_scores():
    (hidden, kernel, weights), tokens = inputs()
    by_chunk = next_token_loss(
        hidden, tokens, weights, kernel, lambda head, x, index, row: (1 + index) * (1 + row) * (x @ head), chunk=8
    )
    factors = np.repeat([1.0, 2.0, 3.0], 8)[None, :T, None] * np.array([1.0, 2.0, 3.0])[:, None, None]
    wanted = chunked(factors * hidden, kernel, weights, tokens, T)
    np.testing.assert_allclose(by_chunk["loss"], wanted["loss"], rtol=1e-5)


def test_a_chunk_above_the_length_costs_no_more_than_the_length():
    (hidden, kernel, weights), tokens = inputs()

    def flops(chunk):
        loss = jax.jit(lambda h, k: chunked(h, k, weights, tokens, chunk)["loss"])
        return loss.lower(hidden, kernel).compile().cost_analysis()["flops"]

    assert flops(8 * T) == flops(T)


def test_logits_of_the_whole_batch_are_never_formed():
    (hidden, kernel, weights), tokens = inputs()
    grad = jax.jit(jax.grad(lambda h, k: chunked(h, k, weights, tokens, 5)["loss"], (0, 1)))
    program = grad.lower(hidden, kernel).as_text()
    sizes = {
        tuple(map(int, dims.split("x")))
        for dims in re.findall(r"tensor<((?:\d+x)+\d+)xf32>", program.replace("xf32", "xf32"))
    }
    assert (B, 5, V) in sizes
    assert max(int(np.prod(size)) for size in sizes if V in size) <= B * 5 * V
