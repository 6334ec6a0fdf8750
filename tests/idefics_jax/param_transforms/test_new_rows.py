"""New vocabulary rows: they are read in place of the tables' own, and train while the others stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idefics_jax.param_transforms import lora, new_rows, paths
from tests.idefics_jax import tiny

COUNT = 3
SIZE = tiny.CONFIG.text_config.vocab_size


def with_new_ids(seed):
    batch = tiny.batch(seed)
    batch["tokens"][:, 5:8] = [SIZE - 3, SIZE - 1, SIZE - 4]  # SIZE - 2 is the image
    return batch


def test_rows_start_as_those_of_the_tables():
    params = tiny.params()
    rows = new_rows.init(params, COUNT)
    shapes = {path: leaf.shape for path, leaf in paths.flatten(rows).items()}
    assert shapes == {"text_model/embed_tokens/new_rows": (3, 16), "text_model/lm_head/new_rows": (16, 3)}
    plain = tiny.logits({"params": params}, with_new_ids(0))
    np.testing.assert_allclose(tiny.logits({"params": params, "adapters": rows}, with_new_ids(0)), plain, atol=1e-6)


def test_trained_rows_beside_the_tables_equal_the_merged_ones():
    params = tiny.params()
    rows = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), new_rows.init(params, COUNT))
    merged = new_rows.merge(params, rows)
    beside = tiny.logits({"params": params, "adapters": rows}, with_new_ids(0))
    assert float(jnp.max(jnp.abs(beside - tiny.logits({"params": params}, with_new_ids(0))))) > 0.1
    np.testing.assert_allclose(beside, tiny.logits({"params": merged}, with_new_ids(0)), atol=1e-5)
    for path, kept in (("embed_tokens", np.s_[: SIZE - COUNT]), ("lm_head", np.s_[:, : SIZE - COUNT])):
        (before,), (after,) = params["text_model"][path].values(), merged["text_model"][path].values()
        np.testing.assert_array_equal(after[kept], before[kept])
        assert np.all(np.asarray(after) == np.asarray(before)) == np.False_


def test_gradient_of_the_rows_is_that_of_their_place_in_the_tables():
    params, batch = tiny.params(), with_new_ids(0)
    rows = new_rows.init(params, COUNT)

    def loss(variables):
        return jnp.mean(tiny.logits(variables, batch) ** 2)

    of_rows = jax.grad(lambda tree: loss({"params": params, "adapters": tree}))(rows)["text_model"]
    whole = jax.grad(lambda tree: loss({"params": tree}))(params)["text_model"]
    wanted = {
        "embed_tokens": whole["embed_tokens"]["embedding"][-COUNT:],
        "lm_head": whole["lm_head"]["kernel"][:, -COUNT:],
    }
    for module, gradient in wanted.items():
        scale = float(jnp.max(jnp.abs(gradient)))
        assert scale > 0
        np.testing.assert_allclose(of_rows[module]["new_rows"] / scale, gradient / scale, atol=1e-5)


def test_rows_and_lora_on_the_head_compose():
    params = tiny.params()
    spec = (lora.LoraTarget("text_model/lm_head", rank=2, alpha=4.0),)
    adapters = jax.tree.map(lambda x: x + 0.3, lora.init(params, spec, jax.random.key(0)))
    both = {"text_model": {**new_rows.init(params, COUNT)["text_model"]}}
    both["text_model"]["lm_head"] = {**both["text_model"]["lm_head"], **adapters["text_model"]["lm_head"]}
    found = tiny.logits({"params": params, "adapters": lora.scale(both, spec)}, tiny.batch(0))
    merged = new_rows.merge(lora.merge(params, both, spec), both)
    np.testing.assert_allclose(found, tiny.logits({"params": merged}, tiny.batch(0)), atol=1e-5)


def test_more_rows_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="new_rows is 65, but the vocabulary has only 64 rows"):
        new_rows.init(tiny.params(), 65)
