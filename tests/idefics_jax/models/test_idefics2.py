"""The whole model against transformers' Idefics2, and against itself packed, batched, padded and in bf16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from idefics_jax.models.idefics2 import Idefics2, merge
from tests.idefics_jax import reference
from tests.idefics_jax.reference import WHOLE, assert_close, document

# Sizes in pixels: many are not multiples of the patch, and the counts of images are ragged.
LAYOUTS = (
    (3, (13, 22), 4, (40, 8), 5),
    ((17, 17), (5, 39), (8, 40), 2),
    (6,),
    (2, (40, 40)),
)


@pytest.fixture(scope="module")
def twin():
    return reference.twin(text={"sliding_window": 9})


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [document(rng, *layout) for layout in LAYOUTS]


@pytest.fixture(scope="module")
def alone(twin, documents):
    """The reference's logits of each document."""
    return twin.logits_hf(documents)


CONFIGS = {
    "one key-value head, activations of other kinds": {
        "vision": {"hidden_act": "gelu"},
        "perceiver": {"num_key_value_heads": 1, "hidden_act": "relu"},
        "text": {"num_key_value_heads": 1, "hidden_act": "gelu"},
    },
    "two key-value heads, short window": {"text": {"sliding_window": 5}},
    "all key-value heads, tied head, a padding token among the words": {
        "perceiver": {"num_key_value_heads": 4},
        "text": {"num_key_value_heads": 4, "pad_token_id": 49},
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_loss_and_every_gradient_are_the_reference_s(changes, documents):
    twin = reference.twin(**changes)
    assert sum(np.count_nonzero(document.tokens == 49) for document in documents)
    batch = reference.batch([[document] for document in documents], vision_rows=2)
    assert_close(twin.logits(batch), twin.logits_hf(documents), WHOLE)
    (loss, grads), (loss_hf, grads_hf) = twin.loss_and_grads(batch), twin.loss_and_grads_hf(documents)
    np.testing.assert_allclose(loss, loss_hf, rtol=WHOLE)
    reference.assert_same_grads(grads, grads_hf, WHOLE)


def test_left_padding_is_the_reference_s(twin, documents):
    batch = reference.batch([[document] for document in documents], side="left")
    assert_close(twin.logits(batch), twin.logits_hf(documents, side="left"), WHOLE)


def test_spare_tokens_patches_and_images_change_nothing(twin, documents, alone):
    batch = reference.batch([[document] for document in documents], spare=3)
    assert_close(twin.logits(batch), alone, WHOLE)


def test_a_batch_is_its_rows_alone(twin, documents):
    """In shapes of the batch, so that one program serves both."""
    batch = reference.batch([[document] for document in documents])
    together = reference.apply(twin.model, twin.params, batch)
    one_row = [jax.tree.map(lambda x, row=row: x[row : row + 1], batch) for row in range(len(documents))]
    apart = np.concatenate([reference.apply(twin.model, twin.params, row) for row in one_row])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vision_rows", [1, 3])
def test_packed_documents_have_the_logits_they_have_alone(vision_rows, twin, documents, alone):
    """Two and three documents in a row; their images side by side, or dealt over the vision rows out of order."""
    a, b, c, d = documents
    batch = reference.batch([[a, b], [d, c, a]], vision_rows=vision_rows, spare=2)
    assert_close(twin.logits(batch), [alone[i] for i in (0, 1, 3, 2, 0)], WHOLE)


def test_packed_gradients_are_those_of_one_document_a_row(twin, documents):
    a, b, c, d = documents
    loss, grads = twin.loss_and_grads(reference.batch([[a, b], [d, c]], vision_rows=2))
    loss_hf, grads_hf = twin.loss_and_grads_hf(documents)
    np.testing.assert_allclose(loss, loss_hf, rtol=WHOLE)
    reference.assert_same_grads(grads, grads_hf, WHOLE)


def test_text_alone_needs_no_patches(twin):
    rng = np.random.default_rng(1)
    documents = [document(rng, 11), document(rng, 4)]
    batch = reference.batch([[document] for document in documents])
    text_only = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    expected = twin.logits_hf(documents)
    assert_close(twin.logits(batch), expected, WHOLE)
    assert_close(twin.logits(text_only), expected, WHOLE)


def test_bf16_keeps_the_distribution_and_the_choice():
    """Our bf16 against the reference's float32, on a model that has learned its text.

    An untrained one has made no choice: its best two logits are often closer than bf16 can tell.
    """
    twin, rng = reference.twin(), np.random.default_rng(0)
    documents = [document(rng, 12, (13, 22), 20, (40, 8), 25) for _ in range(8)]
    inputs = reference.hf_inputs(documents)
    targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(twin.hf.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        twin.hf(**inputs, labels=targets).loss.backward()
        optimizer.step()
    params = reference.converted(twin.hf, twin.config)
    batch = reference.batch([[document] for document in documents])
    logits = reference.apply(Idefics2(twin.config, jnp.bfloat16), params, batch)
    assert logits.dtype == jnp.float32

    ours = np.concatenate(reference.per_document(batch, jax.nn.log_softmax(logits)))
    theirs = np.concatenate([np.asarray(jax.nn.log_softmax(x)) for x in twin.logits_hf(documents)])
    divergence = np.sum(np.exp(theirs) * (theirs - ours), axis=-1)
    assert divergence.mean() <= 1e-3
    assert np.mean(ours.argmax(-1) == theirs.argmax(-1)) >= 0.99


def test_merge_gives_each_image_token_of_a_row_the_next_latent():
    x = -jnp.ones((2, 6, 1))
    latents = jnp.arange(2 * 2 * 2, dtype=jnp.float32).reshape(2, 2, 2, 1)  # the second image of row 1 is padding
    is_image = jnp.array([[1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]], bool)
    merged = merge(x, latents, is_image)[..., 0]
    np.testing.assert_array_equal(merged, [[0, 1, -1, 2, -1, 3], [-1, 4, 5, -1, -1, -1]])
