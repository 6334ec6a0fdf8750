import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import obelics
from data_pipelines.rejection import BadRow
from idefics_jax.documents import Image, Text


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").write_bytes(b"a")
    (tmp_path / "secret").write_bytes(b"secret")
    url = "https://example.com/b.jpg?size=2"
    (tmp_path / "root" / hashlib.sha256(url.encode()).hexdigest()).write_bytes(b"b")
    return str(tmp_path / "root")


def test_texts_and_images_come_in_reading_order(folder):
    page = {
        "images": [None, "a.png", None, None, "https://example.com/b.jpg?size=2"],
        "texts": ["One.", None, "Two.", "Three.", None],
    }
    assert obelics.parts(page, folder) == (
        Text("One.", trained=True),
        Image(b"a"),
        Text("Two.", trained=True),
        Text("\n\nThree.", trained=True),
        Image(b"b"),
    )


def test_a_page_without_images_needs_no_folder():
    assert obelics.parts({"images": [None], "texts": ["Only words."]}, None) == (Text("Only words.", trained=True),)


@pytest.mark.parametrize(
    ("images", "texts", "reason"),
    [
        (["a.png"], ["and text"], "not-one-of-two"),
        ([None], [None], "not-one-of-two"),
        (["a.png"], [None, "more"], "lengths-differ"),
        ([], [], "empty"),
        (None, None, "empty"),
        (["gone.png"], [None], "missing-image"),
        (["."], [None], "missing-image"),
        (["a\0.png"], [None], "missing-image"),
        (["x" * 300], [None], "missing-image"),
        (["http://example.com/never-fetched.png"], [None], "missing-image"),
        (["file:///etc/passwd"], [None], "missing-image"),
        (["../secret"], [None], "outside-image-root"),
        (["b/../../secret"], [None], "outside-image-root"),
        (["/etc/passwd"], [None], "outside-image-root"),
    ],
)
def test_rows_without_a_document_are_refused_by_reason(folder, images, texts, reason):
    with pytest.raises(BadRow) as refused:
        obelics.parts({"images": images, "texts": texts}, folder)
    assert refused.value.reason == reason


def test_the_training_form_gives_the_same_document(folder):
    page = {"images": [None, "a.png", None], "texts": ["One.", None, "Two."], "general_metadata": "{}"}
    stored = obelics.with_images(page, folder, max_missing=None)
    assert stored["images"] == [None, b"a", None]
    assert stored["general_metadata"] == "{}"
    assert obelics.parts(stored, None) == obelics.parts(page, folder)
    assert obelics.with_images(stored, None, max_missing=None) == stored


def test_missing_images_leave_the_page_up_to_their_share(folder):
    page = {"images": ["gone.png", None, "a.png"], "texts": [None, "One.", None]}
    kept = {"images": [None, b"a"], "texts": ["One.", None]}
    assert obelics.with_images(page, folder, max_missing=0.5) == kept
    for share, reason in [(None, "missing-image"), (0.49, "filter:document_max_missing_images")]:
        with pytest.raises(BadRow) as refused:
            obelics.with_images(page, folder, max_missing=share)
        assert refused.value.reason == reason


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_path_out_of_the_folder_is_no_missing_image(folder, name):
    with pytest.raises(BadRow) as refused:
        obelics.with_images({"images": [name], "texts": [None]}, folder, max_missing=1.0)
    assert refused.value.reason == "outside-image-root"


def page(*positions):
    """A page of texts, and of images as numbers."""
    return {
        "images": [None if isinstance(shown, str) else shown for shown in positions],
        "texts": [shown if isinstance(shown, str) else None for shown in positions],
    }


def test_a_long_text_is_cut_between_passages_and_loses_no_word():
    text = "A sentence of some words. " * 40
    row = page("Before.", text, 1)
    count = obelics.units(row)
    assert count > 5
    pieces = [obelics.piece(row, i, i + 1) for i in range(count)]
    assert pieces[0] == page("Before.")
    assert " ".join(piece["texts"][0] for piece in pieces[1:]) == text
    assert all(piece["texts"][0].endswith("words.") for piece in pieces[1:-1])
    assert obelics.piece(row, 0, 3)["texts"] == ["Before.", " ".join(piece["texts"][0] for piece in pieces[1:3])]


def test_an_image_goes_with_the_words_after_it_and_a_last_one_with_those_before():
    row = page("One.", 1, 2, "Two.", "Three.", 3)
    pieces = [obelics.piece(row, i, i + 1) for i in range(obelics.units(row))]
    assert pieces == [page("One."), page(1, 2, "Two."), page("Three.", 3)]


def test_of_a_long_run_of_images_only_the_nearest_go_with_words():
    row = page(1, 2, 3, 4, "One.", 5, 6, 7)
    pieces = [obelics.piece(row, i, i + 1) for i in range(obelics.units(row))]
    assert pieces == [page(1), page(2), page(3, 4, "One.", 5, 6), page(7)]
    alone = page(1, 2, 3)
    assert [obelics.piece(alone, i, i + 1) for i in range(3)] == [page(1), page(2), page(3)]


@given(st.lists(st.integers() | st.text(st.sampled_from("a. \n"), max_size=900), min_size=1, max_size=8), st.data())
def test_pieces_put_together_are_the_page(positions, data):
    row = page(*positions)
    count = obelics.units(row)
    assert obelics.piece(row, 0, count) == row
    cut = data.draw(st.integers(0, count))
    both = [obelics.piece(row, *span) for span in ((0, cut), (cut, count)) if span[0] < span[1]]
    assert [image for piece in both for image in piece["images"] if image is not None] == [
        image for image in row["images"] if image is not None
    ]
    words = "".join(text for piece in both for text in piece["texts"] if text is not None)
    assert words.split() == "".join(text for text in row["texts"] if text is not None).split() or cut
