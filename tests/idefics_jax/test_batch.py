"""Placing documents in a batch by hand: every array, and what is refused."""

import numpy as np
import pytest

from idefics_jax import images
from idefics_jax.batch import BatchShape, Encoded, batch_spec, empty_batch, patch_places, place_document

SHAPE = BatchShape(rows=2, tokens=8, vision_rows=2, patches=5, images=3, patch_dim=12)


def document(tokens, trained, *grids) -> Encoded:
    return Encoded(np.array(tokens, np.int32), np.array(trained, bool), (), grids)


def pixels(encoded: Encoded, value: int) -> list[np.ndarray]:
    return [np.full((rows * columns, 12), value + n, np.uint8) for n, (rows, columns) in enumerate(encoded.grids)]


def place(batch, encoded, **changes) -> None:
    where = {
        "patches": pixels(encoded, 10),
        "segment": 1,
        "token_offset": 0,
        "image_offset": 0,
        "vision_slots": [(0, 0)] * len(encoded.grids),
        "positions_per_side": 4,
    }
    place_document(batch, 0, encoded=encoded, **{**where, **changes})


def test_two_documents_share_a_row():
    batch = empty_batch(SHAPE)
    first = document([1, 7, 7, 5], [False, False, False, True], (1, 2), (2, 2))
    second = document([1, 6, 9], [False, True, True], (1, 3))
    place(batch, first, vision_slots=[(0, 0), (1, 0)])
    place(
        batch,
        second,
        patches=pixels(second, 90),
        segment=2,
        token_offset=4,
        image_offset=2,
        vision_slots=[(0, 2)],
    )
    assert batch["tokens"][0].tolist() == [1, 7, 7, 5, 1, 6, 9, 0]
    assert batch["segment_ids"][0].tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch["loss_weights"][0].tolist() == [0, 0, 1, 0, 1, 1, 0, 0]
    assert batch["patch_image_ids"][0].tolist() == [[1, 1, 3, 3, 3], [2, 2, 2, 2, 0]]
    assert batch["patches"][0, :, :, 0].tolist() == [[10, 10, 90, 90, 90], [11, 11, 11, 11, 0]]
    across = images.position_ids(1, 2, 4).tolist() + images.position_ids(1, 3, 4).tolist()
    assert batch["patch_positions"][0].tolist() == [across, [*images.position_ids(2, 2, 4).tolist(), 0]]
    assert batch["image_mask"][0].tolist() == [1, 1, 1]
    assert all(not array[1].any() for array in batch.values())


def test_patches_may_be_in_their_places_before_the_document_is():
    encoded, slots = document([1, 7, 7, 5], [False] * 4, (1, 2), (2, 2)), [(1, 3), (0, 1)]
    wanted, batch = empty_batch(SHAPE), empty_batch(SHAPE)
    place(wanted, encoded, vision_slots=slots)
    for there, patches in zip(patch_places(batch, 0, encoded.grids, slots), pixels(encoded, 10), strict=True):
        there[:] = patches
    place(batch, encoded, vision_slots=slots, patches=None)
    for name, array in wanted.items():
        np.testing.assert_array_equal(batch[name], array)


def test_a_document_trains_nothing_across_its_end():
    batch = empty_batch(SHAPE)
    place(batch, document([5, 6], [True, True]))
    place(batch, document([7, 8], [True, True]), segment=2, token_offset=2)
    assert batch["loss_weights"][0].tolist() == [1, 0, 1, 0, 0, 0, 0, 0]


def test_an_empty_document_leaves_the_batch_empty():
    batch = empty_batch(SHAPE)
    place(batch, document([], []))
    assert all(not array.any() for array in batch.values())


def test_an_empty_batch_is_what_the_spec_says():
    batch = empty_batch(SHAPE)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in batch_spec(SHAPE).items()
    }


@pytest.mark.parametrize(
    ("encoded", "changes", "message"),
    [
        (document([1] * 5, [True] * 5), {"token_offset": 4}, "5 tokens at offset 4 does not fit a row of 8"),
        (document([1], [True], (1, 1)), {"image_offset": 3}, "1 images after 3 others does not fit a row of 3"),
        (document([1], [True], (1, 1)), {"vision_slots": []}, "1 sets of patches and 0 places"),
        (document([1], [True], (1, 1)), {"patches": []}, "0 sets of patches and 1 places"),
        (document([1], [True], (2, 2)), {"patches": [np.zeros((3, 12), np.uint8)]}, "2 x 2 patches came with 3"),
        (document([1], [True], (2, 3)), {}, "6 patches at patch 0 of vision row 0 does not fit 2 vision rows of 5"),
        (document([1], [True], (1, 2)), {"vision_slots": [(0, 4)]}, "2 patches at patch 4"),
        (document([1], [True], (1, 2)), {"vision_slots": [(2, 0)]}, "of vision row 2"),
    ],
    ids=["tokens", "images", "no slot", "no patches", "other patches", "too large", "over the end", "no such row"],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(encoded, changes, message):
    batch = empty_batch(SHAPE)
    with pytest.raises(ValueError, match=message):
        place(batch, encoded, **changes)
    assert all(not array.any() for array in batch.values())
