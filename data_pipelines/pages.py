"""Pages of scanned documents: images of the pages and the text on each, in order.

A row is a document in The Cauldron's way of holding images, `images: list<struct{bytes, path}>`, with `texts:
list<string>`, the text of each page: what OCR-IDL and PDFA hold, once the pages are rendered. The images come first and
then the texts, joined by blank lines, as in the authors' code; the loss is on all text. A long document is cut between
lines, a long line between passages, and each piece has the images of the pages it touches.
"""

import functools
import re
from typing import Any

import pyarrow as pa

from data_pipelines.cauldron import SCHEMA as CAULDRON
from data_pipelines.cauldron import stored_image
from data_pipelines.passages import passages
from data_pipelines.rejection import BadRow
from idefics_jax.documents import Part, Text

SCHEMA = pa.schema([CAULDRON.field("images"), ("texts", pa.list_(pa.string()))])
NEEDED = (SCHEMA,)


def parts(row: dict[str, Any], image_root: str | None) -> tuple[Part, ...]:
    """Turns a row into the parts of a document: the pages' images, then their texts.

    Raises:
      BadRow: there is not one text for each image, a page is missing, or no page has text.
    """
    texts = _texts(row)
    written = "\n\n".join(text for text in texts if text)
    if not written.strip():
        raise BadRow("nothing-trained", "no page has text; drop the document")
    return (*(stored_image(image, image_root) for image in row["images"]), Text(written, trained=True))


def units(row: dict[str, Any]) -> int:
    """Returns the number of lines, a long one counted in pieces: where a long document may be cut; raises BadRow."""
    return len(_lines(row))


def piece(row: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """Returns the document of lines [first, end), with the images of their pages."""
    lines = _lines(row)[first:end]
    pages = sorted({page for page, _ in lines})
    texts = ["".join(line for own, line in lines if own == page).removesuffix("\n") for page in pages]
    return {"images": [row["images"][page] for page in pages], "texts": texts}


def _texts(row: dict[str, Any]) -> list[str]:
    """Returns the text of each page; raises BadRow."""
    images, texts = row["images"] or (), row["texts"] or ()
    if not images or len(images) != len(texts):
        raise BadRow("lengths-differ", f"it has {len(images)} page images and {len(texts)} texts; give one for each")
    if None in texts:
        raise BadRow("null-text", "a page has no text; give an empty one or drop the page")
    return texts


def _lines(row: dict[str, Any]) -> tuple[tuple[int, str], ...]:
    """Returns (page, line) of every line with its line feed; a page without text is one empty line; raises BadRow."""
    return _cut_into_lines(tuple(_texts(row)))


@functools.lru_cache(maxsize=16)  # the pieces of a document ask for its lines again and again
def _cut_into_lines(texts: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    return tuple(
        (page, piece)
        for page, text in enumerate(texts)
        for line in re.split(r"(?<=\n)", text)
        for piece in passages(line)
    )
