"""The optimizer: schedule, a rate and a decay for each row of the table, Muon on matrices only, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idefics_jax.param_transforms import partition, paths
from idefics_jax.param_transforms.partition import Rule
from idefics_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule, peak_rates

CONFIG = OptimizerConfig(
    name="adamw",
    learning_rate=0.5,
    muon_learning_rate=0.25,
    schedule="linear",
    warmup_steps=4,
    b1=0.9,
    b2=0.95,
    clip_norm=1.0,
)
PARAMS = {
    "params": {"a": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((4,))}, "lm_head": {"kernel": jnp.ones((4, 5))}}
}
RULES = (Rule(".*/kernel", "trainable", 0.5, 0.1), Rule(".*", "trainable", 2.0, 0.0))
CHOSEN = partition.choose(PARAMS["params"], {}, RULES)


def test_schedule_warms_up_and_decays_to_zero():
    rate = make_schedule(CONFIG, 1.0, 12)
    np.testing.assert_allclose([rate(step) for step in (0, 2, 4, 8, 12)], [0.2, 0.6, 1.0, 0.5, 0.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_row_of_the_table_has_its_own_rate_and_decay(name):
    config = dataclasses.replace(CONFIG, name=name, warmup_steps=0, schedule="constant")
    optimizer = make_optimizer(config, PARAMS, CHOSEN, 10)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)[0]["params"]
    rate = {"adamw": 0.5, "muon": 0.25}[name]
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1 * 0.5 * rate, rtol=1e-6)
    assert jnp.all(updates["a"]["bias"] == 0)
    once = partition.choose(PARAMS["params"], {}, (Rule(".*", "trainable", 1.0, 0.0),))
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    first, wanted = (
        tx.update(ones, tx.init(PARAMS), PARAMS)[0]["params"]["a"]["bias"]
        for tx in (optimizer, make_optimizer(config, PARAMS, once, 10))
    )
    np.testing.assert_allclose(first, 2.0 * wanted, rtol=1e-6)


def test_three_steps_are_those_of_clipped_adamw_reckoned_by_hand():
    """Loshchilov and Hutter's update, with the gradient's global norm brought down to the bound before it."""
    config = dataclasses.replace(CONFIG, learning_rate=0.1, warmup_steps=0, schedule="constant", clip_norm=0.5)
    rule = Rule(".*", "trainable", 1.0, 0.01)
    optimizer = make_optimizer(config, PARAMS, partition.choose(PARAMS["params"], {}, (rule,)), 10)
    state, params = optimizer.init(PARAMS), PARAMS
    by_hand = {path: np.asarray(x, np.float64) for path, x in paths.flatten(PARAMS).items()}
    first = second = dict.fromkeys(by_hand, 0.0)
    for step in (1, 2, 3):
        grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(step + x.size), x.shape) / step**3, PARAMS)  # noqa: B023
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        flat = {path: np.asarray(x, np.float64) for path, x in paths.flatten(grads).items()}
        norm = np.sqrt(sum((g**2).sum() for g in flat.values()))
        assert (norm > 0.5) == (step < 3), "the last is not clipped"
        flat = {path: g * min(1.0, 0.5 / norm) for path, g in flat.items()}
        first = {path: 0.9 * first[path] + 0.1 * g for path, g in flat.items()}
        second = {path: 0.95 * second[path] + 0.05 * g**2 for path, g in flat.items()}
        for path, x in by_hand.items():
            mean, square = first[path] / (1 - 0.9**step), second[path] / (1 - 0.95**step)
            by_hand[path] = x - 0.1 * (mean / (np.sqrt(square) + 1e-8) + 0.01 * x)
    for path, x in paths.flatten(params).items():
        np.testing.assert_allclose(x, by_hand[path], rtol=1e-5, err_msg=path)


def test_peak_rates_are_those_of_the_updates():
    flat = peak_rates(CONFIG, PARAMS, CHOSEN)
    assert flat == {"a/kernel": 0.25, "a/bias": 1.0, "lm_head/kernel": 0.25}
    muon = peak_rates(dataclasses.replace(CONFIG, name="muon"), PARAMS, CHOSEN)
    assert muon == {"a/kernel": 0.125, "a/bias": 1.0, "lm_head/kernel": 0.25}


def test_muon_orthogonalises_each_layers_matrix():
    config = dataclasses.replace(CONFIG, name="muon", warmup_steps=0, schedule="constant")
    chosen = partition.choose(PARAMS["params"], {}, (Rule(".*", "trainable", 1.0, 0.0),))
    optimizer = make_optimizer(config, PARAMS, chosen, 10)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    for matrix in updates["params"]["a"]["kernel"]:
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert singular.max() / singular.min() < 2, "each layer's update is near orthogonal"
    head = updates["params"]["lm_head"]["kernel"]
    np.testing.assert_allclose(np.abs(head), np.abs(head[0, 0]), rtol=1e-3, err_msg="Adam's first step is all signs")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "sgd", "optimizer.name is 'sgd'"),
        ("schedule", "step", "optimizer.schedule is 'step'"),
        ("learning_rate", -1.0, "optimizer.learning_rate is -1.0"),
        ("b2", 1.0, "optimizer.b2 is 1.0"),
        ("warmup_steps", -1, "optimizer.warmup_steps is -1"),
    ],
)
def test_impossible_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})
