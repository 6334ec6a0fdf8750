"""The sizes that prompts are padded to: room for each of them, and no more patches than they need."""

import numpy as np

from idefics_jax.batch import Encoded
from idefics_jax.inference.answer import IMAGE_BUCKET, PATCH_BUCKET, TOKEN_BUCKET, bucket
from idefics_jax.processor import first_fit


def prompt(tokens: int, *grids: tuple[int, int]) -> Encoded:
    return Encoded(np.zeros(tokens, np.int32), np.zeros(tokens, bool), (), grids)


def test_first_fit_opens_a_row_only_where_no_other_has_room():
    assert first_fit([3, 4, 2, 5, 1], 6) == [(0, 0), (1, 0), (0, 3), (2, 0), (0, 5)]
    assert first_fit([], 6) == []


def test_a_bucket_has_room_for_every_prompt_and_no_row_for_each_image():
    prompts = [prompt(70, (8, 8)), prompt(3, (15, 19), (8, 12)), prompt(129, (11, 15), (11, 11), (11, 10))]
    shape = bucket(prompts, rows=2, patch_dim=12)
    assert (shape.rows, shape.tokens, shape.images, shape.patch_dim) == (2, 3 * TOKEN_BUCKET, IMAGE_BUCKET, 12)
    # 396 patches are the most of a prompt; a row for each of three images would take 3 x 320.
    assert (shape.vision_rows, shape.patches) == (1, 7 * PATCH_BUCKET)


def test_a_bucket_has_several_short_rows_where_a_long_one_would_be_emptier():
    """Two images of 65 take two rows of 128 or one of 192."""
    assert bucket([prompt(1, (5, 13), (5, 13))], rows=1, patch_dim=12).patches == 192
    shape = bucket([prompt(1, (8, 8), (8, 8))], rows=1, patch_dim=12)
    assert (shape.vision_rows, shape.patches) == (2, 64)


def test_a_bucket_of_text_alone_or_of_nothing_has_the_least_there_can_be():
    for prompts in ([prompt(5)], []):
        shape = bucket(prompts, rows=1, patch_dim=12)
        assert (shape.tokens, shape.vision_rows, shape.patches, shape.images) == (
            TOKEN_BUCKET,
            1,
            PATCH_BUCKET,
            IMAGE_BUCKET,
        )
