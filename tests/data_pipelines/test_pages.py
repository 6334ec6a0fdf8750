"""Pages: images first, then the texts; a long document is cut between lines and keeps the images of its pages."""

import pytest

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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": [], "texts": ["a"]}, "0 page images and 1 texts"),
        ({"images": None, "texts": None}, "0 page images and 0 texts"),
        ({**ROW, "texts": ["a", None]}, "a page has no text"),
        ({**ROW, "images": [None, None]}, "neither bytes nor a path"),
    ],
)
def test_rows_that_are_no_document_are_named(row, message):
    with pytest.raises(BadRow, match=message):
        pages.parts(row, None)
