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
        ({"jpg": None, "caption": "a cat", "status": "success"}, "null-image"),
        ({"jpg": None, "caption": "a cat", "status": "failed_to_download"}, "filter:not_downloaded"),
        ({"jpg": None, "caption": None, "status": "failed_to_resize"}, "filter:not_downloaded"),
        ({"jpg": b"x", "caption": None}, "null-text"),
        ({"jpg": b"x", "caption": ""}, "null-text"),
    ],
)
def test_rows_without_a_document_are_refused_by_reason(row, reason):
    with pytest.raises(BadRow) as refused:
        pairs.parts(row, None)
    assert refused.value.reason == reason


def test_the_training_form_gives_the_same_document():
    row = {"webp": b"x", "caption": "a cat", "alt": "cat.webp"}
    stored = pairs.with_images(row, None, max_missing=None)
    assert stored == {"image": b"x", "caption": "a cat", "alt": "cat.webp"}
    assert pairs.parts(stored, None) == pairs.parts(row, None)
    assert pairs.with_images(stored, None, max_missing=None) == stored


def test_captions_are_drawn_by_their_shares():
    row = {"image": b"x", "alt": "a", "made": "b"}
    drawn = [pairs.with_caption(row, (("alt", 1.0), ("made", 3.0)), i / 100)["caption"] for i in range(100)]
    assert drawn == ["a"] * 25 + ["b"] * 75


@pytest.mark.parametrize("empty", [None, ""])
def test_a_row_without_the_caption_drawn_takes_the_other(empty):
    captions = (("alt", 0.5), ("made", 0.5))
    for draw in (0.0, 0.9):
        assert pairs.with_caption({"alt": "a", "made": empty}, captions, draw)["caption"] == "a"
        assert pairs.with_caption({"alt": empty, "made": "b"}, captions, draw)["caption"] == "b"
        row = pairs.with_caption({"image": b"x", "alt": empty, "made": empty}, captions, draw)
        with pytest.raises(BadRow, match="no caption"):
            pairs.parts(row, None)
