"""The random batch keeps every promise of batch.py."""

import numpy as np
import pytest

from idefics_jax.batch import BatchShape, batch_spec, fake_batch

VOCAB, IMAGE, LATENTS, PER_SIDE = 50, 7, 4, 9
SHAPES = {
    "several of everything": BatchShape(rows=3, tokens=60, vision_rows=2, patches=40, images=5, patch_dim=12),
    "no token for an image": BatchShape(rows=2, tokens=4, vision_rows=1, patches=9, images=2, patch_dim=12),
    "one token": BatchShape(rows=1, tokens=1, vision_rows=1, patches=1, images=1, patch_dim=12),
    "fewer patches than images": BatchShape(rows=1, tokens=90, vision_rows=2, patches=2, images=9, patch_dim=12),
    "more patches than positions": BatchShape(rows=2, tokens=30, vision_rows=1, patches=500, images=2, patch_dim=12),
}


def make(shape: BatchShape, seed: int = 0) -> dict:
    return fake_batch(
        shape, vocab_size=VOCAB, image_token_id=IMAGE, num_latents=LATENTS, positions_per_side=PER_SIDE, seed=seed
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_has_the_spec_s_shapes_and_valid_ids(shape):
    batch = make(shape)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in batch_spec(shape).items()
    }
    assert batch["tokens"].min() >= 0
    assert batch["tokens"].max() < VOCAB
    assert batch["patch_positions"].max() < PER_SIDE**2
    assert batch["segment_ids"].any(axis=1).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_image_has_its_tokens_and_lies_in_one_vision_row(shape):
    batch = make(shape)
    for tokens, ids, mask in zip(batch["tokens"], batch["patch_image_ids"], batch["image_mask"], strict=True):
        assert (tokens == IMAGE).sum() == LATENTS * mask.sum()
        assert sorted(set(ids.ravel()) - {0}) == list(range(1, mask.sum() + 1))
        assert list(mask) == sorted(mask, reverse=True)
        for image in range(1, mask.sum() + 1):
            assert (ids == image).any(axis=1).sum() == 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_documents_follow_one_another_and_are_trained_on_their_words(shape):
    batch = make(shape)
    for row in range(shape.rows):
        tokens, segments, weights = (batch[name][row] for name in ("tokens", "segment_ids", "loss_weights"))
        used = np.count_nonzero(segments)
        assert np.isin(np.diff(segments[:used]), (0, 1)).all()
        assert not segments[used:].any()
        for segment in range(1, segments.max() + 1):
            place = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(batch["positions"][row, place], np.arange(len(place)))
            np.testing.assert_array_equal(weights[place], [*(tokens[place[1:]] != IMAGE), 0])
        assert not weights[used:].any()


def test_budgets_are_used():
    """So that what is measured on it is what full batches cost."""
    shape = SHAPES["several of everything"]
    batch = make(shape)
    assert batch["image_mask"].all()
    assert (batch["segment_ids"].max(axis=1) == 3).all()
    assert np.mean(batch["segment_ids"] > 0) > 0.85
    assert np.mean(batch["patch_image_ids"] > 0) > 0.6


def test_the_seed_decides():
    shape = SHAPES["several of everything"]
    first, again, other = make(shape, 1), make(shape, 1), make(shape, 2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["tokens"], other["tokens"])
