"""The optimizer: schedule, decay masks, Muon on matrices only, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idefics_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

CONFIG = OptimizerConfig(
    name="adamw",
    learning_rate=0.5,
    muon_learning_rate=0.25,
    schedule="linear",
    warmup_steps=4,
    b1=0.9,
    b2=0.95,
    weight_decay=0.1,
    no_decay=(".*bias",),
    clip_norm=1.0,
)
PARAMS = {"a": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((4,))}, "lm_head": {"kernel": jnp.ones((4, 5))}}


def test_schedule_warms_up_and_decays_to_zero():
    rate = make_schedule(CONFIG, 1.0, 12)
    np.testing.assert_allclose([rate(step) for step in (0, 2, 4, 8, 12)], [0.2, 0.6, 1.0, 0.5, 0.0], rtol=1e-6)


def test_decay_spares_what_it_should():
    optimizer = make_optimizer(CONFIG, PARAMS, 10)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    assert jnp.all(updates["a"]["bias"] == 0)
    assert jnp.all(updates["a"]["kernel"] < 0)


def test_muon_orthogonalises_each_layers_matrix():
    config = dataclasses.replace(CONFIG, name="muon", weight_decay=0.0, warmup_steps=0, schedule="constant")
    optimizer = make_optimizer(config, PARAMS, 10)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    for matrix in updates["a"]["kernel"]:
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert singular.max() / singular.min() < 2, "each layer's update is near orthogonal"
    head = updates["lm_head"]["kernel"]
    np.testing.assert_allclose(np.abs(head), np.abs(head[0, 0]), rtol=1e-3, err_msg="Adam's first step is all signs")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "sgd", "optimizer.name is 'sgd'"),
        ("schedule", "step", "optimizer.schedule is 'step'"),
        ("learning_rate", -1.0, "optimizer.learning_rate is -1.0"),
        ("b2", 1.0, "optimizer.b2 is 1.0"),
        ("weight_decay", -0.1, "optimizer.weight_decay is -0.1"),
        ("warmup_steps", -1, "optimizer.warmup_steps is -1"),
    ],
)
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})


def test_a_decay_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"optimizer.no_decay: '\.\*norm' matches no parameter"):
        make_optimizer(dataclasses.replace(CONFIG, no_decay=(".*norm",)), PARAMS, 10)
