"""Generation is token for token the reference's, whatever the batch, from one compiled program."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from idefics_jax.errors import UserError
from idefics_jax.inference.generate import Decoding, choose, generate
from idefics_jax.param_transforms import lora
from idefics_jax.param_transforms.lora import LoraTarget
from tests.idefics_jax import reference

GREEDY = Decoding(
    max_new_tokens=10, stop_ids=(), banned_ids=(reference.FAKE, reference.IMAGE), temperature=0.0, top_p=1.0
)


@pytest.fixture(scope="module")
def twin():
    return reference.twin(text={"sliding_window": 9})


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(1)
    return [
        reference.document(rng, 3, (12, 20), 4),
        reference.document(rng, 2),
        reference.document(rng, (8, 8), 2, (16, 12), 5),
    ]


def greedy_hf(twin, document, stop_ids=()):
    inputs = reference.hf_inputs([document])
    with torch.no_grad():
        ids = twin.hf.generate(
            **inputs,
            max_new_tokens=GREEDY.max_new_tokens,
            do_sample=False,
            bad_words_ids=[[token] for token in GREEDY.banned_ids],
            eos_token_id=list(stop_ids) or None,
            pad_token_id=0,
        )
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def greedy(twin, documents, decoding=GREEDY, spare=0):
    batch = reference.batch([[document] for document in documents], side="left", spare=spare)
    tokens, lengths = generate(twin.model, {"params": twin.params}, batch, decoding, jax.random.key(0))
    return [row[:length].tolist() for row, length in zip(np.asarray(tokens), np.asarray(lengths), strict=True)]


def test_greedy_is_the_reference_for_prompts_of_different_lengths(twin, documents):
    wanted = [greedy_hf(twin, document) for document in documents]
    assert len({tuple(tokens) for tokens in wanted}) == 3
    assert greedy(twin, documents) == wanted
    assert greedy(twin, documents, spare=5) == wanted, "padding to a bucket changes nothing"


def test_unrolled_generation_is_the_scanned_one_with_adapters_too(twin, documents):
    spec = [LoraTarget("text_model/layers/.*", rank=2, alpha=4.0), LoraTarget("vision_model/.*", rank=2, alpha=4.0)]
    adapters = lora.init(twin.params, spec, jax.random.key(0))
    adapters = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    batch = reference.batch([[document] for document in documents], side="left")
    unrolled = dataclasses.replace(GREEDY, unroll=True)
    results = []
    for collections in ({}, {"adapters": adapters}, {"adapters": {"vision_model": adapters["vision_model"]}}):
        variables = {"params": twin.params, **collections}
        (scanned, _), (tokens, _) = (
            generate(twin.model, variables, batch, decoding, jax.random.key(0)) for decoding in (GREEDY, unrolled)
        )
        np.testing.assert_array_equal(tokens, scanned)
        results.append(np.asarray(tokens))
    assert not any((a == b).all() for a, b in itertools.combinations(results, 2))


def test_the_unrolled_loop_makes_no_copy_of_a_kernel(twin, documents):
    batch = reference.batch([[document] for document in documents], side="left")
    decoding = dataclasses.replace(GREEDY, unroll=True)
    jaxpr = jax.make_jaxpr(generate.__wrapped__, static_argnums=(0, 3))(
        twin.model, {"params": twin.params}, batch, decoding, jax.random.key(0)
    )
    (loop,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "while")
    body, text = loop.params["body_jaxpr"].eqns, twin.config.text_config
    assert "scan" not in {equation.primitive.name for equation in body}
    assert (text.hidden_size, text.intermediate_size) not in [out.aval.shape for line in body for out in line.outvars]


def test_a_row_ends_with_its_own_stop_token(twin, documents):
    free = [greedy_hf(twin, document) for document in documents]
    stops = (free[0][3], free[2][6])
    wanted = [greedy_hf(twin, document, stops) for document in documents]
    assert len({len(tokens) for tokens in wanted}) > 1
    assert greedy(twin, documents, dataclasses.replace(GREEDY, stop_ids=stops)) == wanted


def test_one_program_serves_every_prompt_of_a_bucket(twin, documents):
    generate.clear_cache()
    shape = reference.batch([[documents[2]]], side="left", spare=3)
    for document in documents:
        batch = {name: np.zeros_like(array) for name, array in shape.items()}
        for name, array in reference.batch([[document]], side="left").items():
            left = name in ("tokens", "segment_ids", "positions", "loss_weights")
            corner = tuple(slice(-n, None) if left and axis == 1 else slice(n) for axis, n in enumerate(array.shape))
            batch[name][corner] = array
        tokens, lengths = generate(twin.model, {"params": twin.params}, batch, GREEDY, jax.random.key(0))
        assert tokens[0, : lengths[0]].tolist() == greedy_hf(twin, document)
    assert generate._cache_size() == 1


def test_a_row_of_padding_stays_empty(twin, documents):
    batch = reference.batch([[documents[1]], [documents[1]]], side="left")
    batch["segment_ids"][1] = 0
    tokens, lengths = generate(twin.model, {"params": twin.params}, batch, GREEDY, jax.random.key(0))
    assert lengths.tolist() == [10, 0]
    assert not tokens[1].any()


def test_sampling_follows_the_distribution_within_top_p():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    sampled = dataclasses.replace(GREEDY, banned_ids=(), temperature=1.0, top_p=0.7)
    draws = jax.vmap(lambda key: choose(logits, sampled, key)[0])(jax.random.split(jax.random.key(0), 4000))
    shares = np.bincount(draws, minlength=4) / 4000
    np.testing.assert_allclose(shares, [5 / 8, 3 / 8, 0, 0], atol=0.03)
    hot = dataclasses.replace(sampled, temperature=2.0, top_p=1.0)
    draws = jax.vmap(lambda key: choose(logits, hot, key)[0])(jax.random.split(jax.random.key(0), 4000))
    wanted = np.sqrt([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / 4000, wanted / wanted.sum(), atol=0.03)


def test_banned_tokens_are_never_chosen():
    banned = dataclasses.replace(GREEDY, banned_ids=(1,))
    assert choose(jnp.array([[0.0, 9.0, 3.0]]), banned, jax.random.key(0)).tolist() == [2]


def test_each_sampled_token_has_noise_of_its_own(twin, documents):
    hot = dataclasses.replace(GREEDY, temperature=1e4, banned_ids=())  # as good as uniform: the noise alone decides
    for row in greedy(twin, documents, hot):
        assert len(set(row)) > GREEDY.max_new_tokens // 2


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", 1e-40), ("top_p", 0.0)]
)
def test_impossible_decoding_is_refused(field, value):
    with pytest.raises(UserError, match=field):
        dataclasses.replace(GREEDY, **{field: value})
