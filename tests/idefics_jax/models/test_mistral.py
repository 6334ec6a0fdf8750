"""The decoder against MistralModel, whole and with its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from idefics_jax.cache import empty_cache
from idefics_jax.models.mistral import Mistral
from tests.idefics_jax import reference
from tests.idefics_jax.reference import LEAF, assert_close

LENGTHS = (13, 6, 1)
LONGEST = max(LENGTHS)
STEPS = 5  # decoded one at a time


def decoder(twin: reference.Twin):
    """Returns the compiled function (embeddings, positions, segment ids, cache) -> (hidden, cache)."""
    model = Mistral(twin.config.text_config, twin.config.tie_word_embeddings, jnp.float32, "none")
    params = {"params": twin.params["text_model"]}
    return reference.jit(lambda *inputs: model.apply(params, *inputs))


def random_rows(width: int, lengths: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(length, width)).astype(np.float32) for length in lengths]


def padded(rows: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings [B, T, D], positions and segment ids [B, T]; the padding is ones."""
    lengths = np.array([len(row) for row in rows])[:, None]
    places = np.arange(lengths.max())
    segments = (places >= lengths.max() - lengths if side == "left" else places < lengths).astype(np.int32)
    positions = np.where(segments == 1, np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    x = np.ones((*segments.shape, rows[0].shape[-1]), np.float32)
    x[segments == 1] = np.concatenate(rows)
    return x, positions, segments


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1, "head_dim": None},
        {"num_key_value_heads": 2, "head_dim": 20, "sliding_window": 4},
        {"num_key_value_heads": 4, "sliding_window": 1, "rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "num_hidden_layers": 1},
    ],
    ids=["one kv head", "wide heads and a window", "all kv heads and a window of one", "other theta"],
)
def test_hidden_states_are_the_reference_s(changes):
    twin = reference.twin(text=changes)
    run, rows = decoder(twin), random_rows(twin.config.text_config.hidden_size, LENGTHS)
    for side in ("right", "left"):
        x, positions, segments = padded(rows, side)
        hidden, cache = run(x, positions, segments, None)
        with torch.no_grad():
            inputs = {"inputs_embeds": torch.from_numpy(x), "attention_mask": torch.from_numpy(segments)}
            expected = twin.hf.model.text_model(**inputs).last_hidden_state.numpy()
        assert_close([np.asarray(hidden)[segments == 1]], [expected[segments == 1]], LEAF)
        assert cache is None


@pytest.mark.parametrize(("window", "side"), [(None, "right"), (4, "left")])
def test_prefill_and_decoding_give_what_one_pass_gives(window, side):
    """Rows of different lengths are filled at once, then grow by a token at a time."""
    twin = reference.twin(text={"sliding_window": window})
    config, run = twin.config.text_config, decoder(twin)
    rows = random_rows(config.hidden_size, tuple(length + STEPS for length in LENGTHS))
    x, positions, segments = padded(rows, "right")
    one_pass = np.asarray(run(x, positions, segments, None)[0])[segments == 1]

    x, positions, segments = padded([row[:-STEPS] for row in rows], side)
    new = np.stack([row[-STEPS:] for row in rows])
    cache = empty_cache(config, batch=len(rows), length=LONGEST + STEPS, dtype=jnp.float32)
    hidden, cache = run(x, positions, segments, cache)
    states = [hidden]
    for step in range(STEPS):
        at = np.array(LENGTHS, np.int32)[:, None] + step
        hidden, cache = run(new[:, step : step + 1], at, np.ones_like(at), cache)
        states.append(hidden)
    assert int(cache["index"]) == LONGEST + STEPS
    real = np.pad(segments, ((0, 0), (0, STEPS)), constant_values=1) == 1
    assert_close([np.concatenate(states, axis=1)[real]], [one_pass], LEAF)


def test_a_prompt_may_be_written_in_pieces():
    twin = reference.twin(text={"sliding_window": 4})
    config, run = twin.config.text_config, decoder(twin)
    x, positions, segments = padded(random_rows(config.hidden_size, (LONGEST,)), "right")
    whole, _ = run(x, positions, segments, None)
    cache = empty_cache(config, batch=1, length=LONGEST, dtype=jnp.float32)
    pieces = []
    for begin, end in ((0, 5), (5, 6), (6, LONGEST)):
        hidden, cache = run(x[:, begin:end], positions[:, begin:end], segments[:, begin:end], cache)
        pieces.append(hidden)
    assert_close(pieces, np.split(whole, (5, 6), axis=1), LEAF)


def test_tied_logits_use_the_embedding_table():
    twin = reference.twin(tie_word_embeddings=True)
    assert "lm_head" not in twin.params["text_model"]
    model = Mistral(twin.config.text_config, True, jnp.float32, "none")
    x = np.random.default_rng(0).normal(size=(1, 3, 32)).astype(np.float32)
    ours = model.apply({"params": twin.params["text_model"]}, x, method="logits")
    with torch.no_grad():
        theirs = twin.hf.lm_head(torch.from_numpy(x)).numpy()
    assert_close([np.asarray(ours)], [theirs], LEAF)


def test_logits_are_float32_in_a_bf16_model():
    twin = reference.twin()
    model = Mistral(twin.config.text_config, False, jnp.bfloat16, "none")
    x = jax.random.normal(jax.random.key(0), (1, 3, 32), jnp.bfloat16)
    logits = model.apply({"params": twin.params["text_model"]}, x, method="logits")
    exact = x.astype(jnp.float32) @ twin.params["text_model"]["lm_head"]["kernel"]
    assert_close([np.asarray(logits)], [np.asarray(exact)], LEAF)
