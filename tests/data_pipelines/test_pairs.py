import pytest

from data_pipelines import pairs
from data_pipelines.rejection import BadRow
from idefics_jax.documents import Image, Text


@pytest.mark.parametrize("column", ["jpg", "png", "webp"])
def test_the_caption_follows_the_image_and_is_trained(column):
    assert pairs.parts({column: b"x", "caption": "a cat"}, None) == (Image(b"x"), Text("a cat", trained=True))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"jpg": None, "caption": "a cat"}, "null-image"),
        ({"jpg": b"x", "caption": None}, "null-text"),
        ({"jpg": b"x", "caption": ""}, "null-text"),
    ],
)
def test_rows_without_a_document_are_refused_by_reason(row, reason):
    with pytest.raises(BadRow) as refused:
        pairs.parts(row, None)
    assert refused.value.reason == reason
