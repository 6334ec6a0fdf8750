"""The training step: frozen stays frozen, accumulation changes nothing, bad numbers do not reach the state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.param_transforms import lora, partition, paths
from idefics_jax.param_transforms.partition import Rule
from idefics_jax.training.optimizer import OptimizerConfig, make_optimizer
from idefics_jax.training.step import batch_counts, init_state, make_train_step, norms
from launch.traced import inner_jaxprs
from tests.idefics_jax import tiny

OPTIMIZER = OptimizerConfig(
    name="adamw",
    learning_rate=1e-2,
    muon_learning_rate=1e-2,
    schedule="constant",
    warmup_steps=0,
    b1=0.9,
    b2=0.95,
    clip_norm=1.0,
)
SPEC = (lora.LoraTarget(r"text_model/layers/self_attn/[qkvo]_proj", rank=2, alpha=4.0),)
DORA = (lora.LoraTarget(r"text_model/layers/self_attn/[qkvo]_proj", rank=2, alpha=4.0, dropout=0.1, dora=True),)
CONNECTOR, REST = Rule("connector/.*", "trainable", 1.0, 0.1), Rule(".*", "frozen")
ADAPTERS = Rule(".*/lora_.*", "trainable", 1.0, 0.1)
RULES = {
    "full": ((Rule(".*", "trainable", 1.0, 0.1),), ()),
    "lora": ((ADAPTERS, CONNECTOR, REST), SPEC),
    "dora": ((ADAPTERS, CONNECTOR, REST), DORA),
    "frozen": ((CONNECTOR, REST), ()),
}


def parts(variant: str):
    """The trainable and frozen parts of a variant, its spec, and the rule of every leaf."""
    rules, spec = RULES[variant]
    adapters = lora.init(tiny.params(), spec, jax.random.key(0))
    chosen = partition.choose(tiny.params(), adapters, rules)
    base, frozen = partition.split(tiny.params(), chosen)
    return {"params": base, **({"adapters": adapters} if spec else {})}, frozen, spec, chosen


@functools.cache
def setup(variant: str, accumulation: int, name: str = "adamw"):
    trainable, frozen, spec, chosen = parts(variant)
    optimizer = make_optimizer(OptimizerConfig(**{**vars(OPTIMIZER), "name": name}), trainable, chosen, 100)
    step = jax.jit(
        make_train_step(tiny.MODEL, optimizer, spec, accumulation=accumulation, chunk=8, seed=0, max_skipped=0)
    )
    return step, init_state(trainable, optimizer), frozen


def run(variant, steps, *, accumulation=1, name="adamw", batch=tiny.batch):
    step, state, frozen = setup(variant, accumulation, name)
    metrics = []
    for index in range(steps):
        state, scalars = step(state, frozen, batch(index))
        metrics.append(scalars)
    return state, frozen, metrics


@pytest.mark.parametrize("variant", ["lora", "dora", "frozen"])
def test_frozen_leaves_are_bit_identical_and_have_no_optimizer_state(variant):
    state, frozen, _ = run(variant, 3)
    _, before, _, _ = parts(variant)
    for path, leaf in paths.flatten(frozen).items():
        assert np.array_equal(leaf, paths.flatten(before)[path]), path
    trained = sum(leaf.size for leaf in jax.tree.leaves(state["trainable"]))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim)
    assert moments == 2 * trained


@pytest.mark.parametrize(
    ("variant", "name"), [("lora", "adamw"), ("dora", "adamw"), ("frozen", "adamw"), ("full", "muon")]
)
def test_every_trainable_leaf_moves_and_the_loss_falls(variant, name):
    state, _, metrics = run(variant, 12, name=name, batch=lambda _: tiny.batch(0))
    start = setup(variant, 1, name)[1]
    for path, leaf in paths.flatten(state["trainable"]).items():
        assert not np.array_equal(leaf, paths.flatten(start["trainable"])[path]), path
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.05
    assert int(state["step"]) == 12


def all_shapes(jaxpr):
    """The shapes of everything that a traced program makes, also within its loops."""
    for equation in jaxpr.eqns:
        yield from (out.aval.shape for out in equation.outvars)
        for inner in inner_jaxprs(equation.params):
            yield from all_shapes(inner)


def test_logits_exist_for_no_more_positions_than_a_chunk_has():
    step, state, frozen = setup("lora", 1)
    vocabulary, rows, chunk = tiny.CONFIG.text_config.vocab_size, tiny.SHAPE.rows, 8
    shapes = all_shapes(jax.make_jaxpr(step)(state, frozen, tiny.batch(0)).jaxpr)
    assert max(np.prod(shape) for shape in shapes if shape[-1:] == (vocabulary,)) == rows * chunk * vocabulary


def test_bf16_arithmetic_keeps_float32_masters():
    trainable, frozen, _, chosen = parts("lora")
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    optimizer = make_optimizer(OptimizerConfig(**{**vars(OPTIMIZER), "learning_rate": 1e-5}), trainable, chosen, 100)
    model = Idefics2(tiny.CONFIG, dtype=jnp.bfloat16)
    step = jax.jit(make_train_step(model, optimizer, SPEC, accumulation=1, chunk=8, seed=0, max_skipped=0))
    state, metrics = step(init_state(trainable, optimizer), frozen, tiny.batch(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(state["trainable"])} == {jnp.dtype("float32")}
    kernel = state["trainable"]["params"]["connector"]["modality_projection"]["up_proj"]["kernel"]
    moved = np.asarray(kernel) - np.asarray(
        trainable["params"]["connector"]["modality_projection"]["up_proj"]["kernel"]
    )
    assert 0 < np.abs(moved).max() < 1e-4, "an update that bf16 would have swallowed"
    wanted = run("lora", 1)[2][0]["loss"]
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=2e-2)


def test_accumulation_gives_the_step_of_the_whole_batch():
    def uneven(index):
        batch = tiny.batch(index)
        batch["loss_weights"][0] = 0
        return batch

    whole, _, metrics = run("lora", 1, batch=uneven)
    split, _, split_metrics = run("lora", 1, accumulation=2, batch=uneven)
    np.testing.assert_allclose(metrics[0]["loss"], split_metrics[0]["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["grad_norm"], split_metrics[0]["grad_norm"], rtol=1e-5)
    # AdamW's moments are the clipped gradient and its square: linear in what is compared, as the update is not.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole["opt_state"], split["opt_state"])


@pytest.mark.parametrize("pattern", ["text_model/lm_head", "text_model/layers/mlp/down_proj"])
def test_dropout_reaches_the_head_as_it_does_the_layers(pattern):
    def losses(dropout):
        spec = (lora.LoraTarget(pattern, rank=4, alpha=8.0, dropout=dropout),)
        adapters = lora.init(tiny.params(), spec, jax.random.key(0))
        adapters = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
        optimizer = optax.sgd(0.0)
        step = jax.jit(make_train_step(tiny.MODEL, optimizer, spec, accumulation=1, chunk=8, seed=0, max_skipped=0))
        state = init_state({"adapters": adapters}, optimizer)
        return [
            float(step({**state, "step": jnp.int32(k)}, tiny.params(), tiny.batch(0))[1]["loss"]) for k in (0, 0, 1)
        ]

    plain, dropped = losses(0.0), losses(0.5)
    assert plain[0] == plain[2]
    assert dropped[0] == dropped[1]
    assert len({plain[0], dropped[0], dropped[2]}) == 3, "each step drops out anew"


def test_loss_is_weighted_by_loss_weights():
    step, state, frozen = setup("frozen", 1)
    batch = tiny.batch(0)
    logits = tiny.logits({"params": tiny.params()}, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.asarray(batch["tokens"][:, 1:]))
    weights = batch["loss_weights"][:, :-1]
    np.testing.assert_allclose(
        step(state, frozen, batch)[1]["loss"], np.sum(losses * weights) / weights.sum(), rtol=1e-4
    )


def test_a_step_that_is_not_finite_changes_nothing_and_stops_those_after_it():
    step, state, frozen = setup("frozen", 1)
    state, _ = step(state, frozen, tiny.batch(0))
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), frozen)
    halted, metrics = step(state, bad, tiny.batch(1))
    assert not np.isfinite(metrics["loss"])
    after, _ = step(halted, frozen, tiny.batch(2))
    for stopped in (halted, after):
        assert int(stopped["halted_at"]) == 1
        assert int(metrics["halted_at"]) == 1
        assert int(stopped["step"]) == 1
        for name in ("trainable", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, stopped[name], state[name])


def test_a_skipped_step_counts_but_changes_nothing_until_too_many_are_skipped():
    trainable, frozen, spec, chosen = parts("frozen")
    optimizer = make_optimizer(OPTIMIZER, trainable, chosen, 100)
    step = jax.jit(make_train_step(tiny.MODEL, optimizer, spec, accumulation=1, chunk=8, seed=0, max_skipped=1))
    state, _ = step(init_state(trainable, optimizer), frozen, tiny.batch(0))
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), frozen)
    skipped, metrics = step(state, bad, tiny.batch(1))
    assert (int(skipped["step"]), int(skipped["skipped"]), int(skipped["halted_at"])) == (2, 1, -1)
    assert bool(metrics["skipped"])
    for name in ("trainable", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, skipped[name], state[name])
    going, metrics = step(skipped, frozen, tiny.batch(2))
    assert np.isfinite(metrics["loss"])
    assert not metrics["skipped"]
    halted, metrics = step(going, bad, tiny.batch(3))
    assert (int(halted["step"]), int(halted["halted_at"])) == (3, 3)
    assert not metrics["skipped"], "a step that halts the run is not one that was skipped"


def test_an_update_that_is_not_finite_halts_the_run():
    trainable, frozen, spec, chosen = parts("frozen")
    optimizer = optax.scale(float("inf"))
    step = jax.jit(make_train_step(tiny.MODEL, optimizer, spec, accumulation=1, chunk=8, seed=0, max_skipped=9))
    halted, metrics = step(init_state(trainable, optimizer), frozen, tiny.batch(0))
    assert np.isfinite(metrics["grad_norm"])
    assert int(halted["halted_at"]) == 0


def test_norms_are_told_by_part_with_adapters_counted_with_theirs():
    tree = {
        "params": {"connector": {"a": jnp.full(4, 3.0)}},
        "adapters": {"connector": {"b": jnp.full(1, 8.0)}, "text_model": {"c": jnp.full(9, 1.0)}},
    }
    found = {name: float(value) for name, value in norms(tree, "grad_norm").items()}
    assert found == {
        "grad_norm": pytest.approx(109**0.5),
        "grad_norm/connector": pytest.approx(10.0),
        "grad_norm/text_model": pytest.approx(3.0),
    }


def test_metrics_count_what_the_batch_holds():
    _, _, metrics = run("frozen", 1)
    found = {name: float(metrics[0][name]) for name in ("tokens", "images", "token_fill", "patch_fill")}
    assert found == {"tokens": 80.0, "images": 8.0, "token_fill": pytest.approx(20 / 24), "patch_fill": 1.0}


def test_attention_share_is_that_of_the_pairs_within_an_image():
    ids = jnp.array([[[1, 1, 1, 2], [3, 3, 0, 0]]])
    batch = {"segment_ids": jnp.ones((1, 4)), "patches": None, "patch_image_ids": ids, "image_mask": jnp.ones((1, 5))}
    assert float(batch_counts(batch)["attention_share"]) == pytest.approx((9 + 1 + 4) / (2 * 16))
