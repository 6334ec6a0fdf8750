"""Pages: images first, then the texts; a long document is cut between lines and keeps the images of its pages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import pages
from data_pipelines.rejection import BadRow
from idefics_jax.documents import Image, Text

ROW = {"images": [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}], "texts": ["a\nb", "c\n\nd"]}


def test_images_come_first_and_texts_are_joined_by_a_blank_line():
    assert pages.parts(ROW, None) == (Image(b"1"), Image(b"2"), Text("a\nb\n\nc\n\nd"))


def test_pieces_have_the_images_of_the_pages_they_touch():
    assert pages.units(ROW) == 5
    assert pages.parts(pages.piece(ROW, 1, 3), None) == (Image(b"1"), Image(b"2"), Text("b\n\nc"))
    assert pages.parts(pages.piece(ROW, 2, 5), None) == (Image(b"2"), Text("c\n\nd"))
    assert pages.parts(pages.piece(ROW, 0, 5), None) == pages.parts(ROW, None)


def test_a_long_line_is_cut_between_words():
    line = " ".join(f"word{i}" for i in range(100))
    row = {**ROW, "texts": [f"a\n{line}\nb", "c"]}
    lines = [pages.piece(row, i, i + 1)["texts"][0] for i in range(pages.units(row))]
    assert lines[0] == "a"
    assert lines[-2:] == ["b", "c"]
    assert "".join(lines[1:-2]) == line
    assert all(100 < len(piece) <= 200 and piece.endswith(" ") for piece in lines[1:-3])
    assert pages.parts(pages.piece(row, 0, pages.units(row)), None) == pages.parts(row, None)


def test_a_word_is_never_cut():
    row = {**ROW, "texts": [f"a {'x' * 1000} b", "c"]}
    assert [pages.piece(row, i, i + 1)["texts"][0] for i in range(4)] == ["a ", f"{'x' * 1000} ", "b", "c"]


@given(st.lists(st.text(st.sampled_from("a \n\t"), max_size=1000), min_size=1, max_size=3), st.data())
def test_pieces_put_together_are_the_document(texts, data):
    row = {"images": [{"bytes": b"1", "path": None}] * len(texts), "texts": texts}
    assert pages.piece(row, 0, pages.units(row)) == {**row, "texts": [text.removesuffix("\n") for text in texts]}
    cut = data.draw(st.integers(0, pages.units(row)))
    both = [text for span in ((0, cut), (cut, pages.units(row))) for text in pages.piece(row, *span)["texts"]]
    assert "".join(both).replace("\n", "") == "".join(texts).replace("\n", "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": [], "texts": ["a"]}, "0 page images and 1 texts"),
        ({"images": None, "texts": None}, "0 page images and 0 texts"),
        ({**ROW, "texts": ["a", None]}, "a page has no text"),
        ({**ROW, "texts": ["", " \n"]}, "no page has text"),
        ({**ROW, "images": [None, None]}, "neither bytes nor a path"),
    ],
)
def test_rows_that_are_no_document_are_named(row, message):
    with pytest.raises(BadRow, match=message):
        pages.parts(row, None)
