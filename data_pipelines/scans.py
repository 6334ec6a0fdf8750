"""Scanned documents as OCR-IDL and PDFA publish them, made into rows of pages: images in page order, the text of each.

Layouts (huggingface.co/datasets/pixparse/idl-wds and pdfa-eng-wds, as their own loader, github.com/huggingface/chug,
reads them). The json of a document holds one entry a page, lines in reading order:

    OCR-IDL   {"pages": [{"text": [line, ...], "bbox": ..., "poly": ..., "score": ...}, ...]}, a pdf and a tif
    PDFA      {"pages": [{"lines": {"text": [line, ...], "bbox": ...}, "words": ..., "images_bbox": ...}, ...]}, a pdf

The pdf is taken where both are there, as chug does. Boxes and words are left alone.

Pages are rendered in preparation, never in training: at 150 dots per inch, and at most 1,960 pixels on the longest
side, which is all that four quarters of 980 can show. A grey page on an even ground becomes PNG, which is smaller there
than JPEG and keeps letters sharp; one with colour, or with a scanner's noise, becomes JPEG of quality 90. PDF needs
pypdfium2 (requirements-prepare.txt).
"""

import io
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import PIL.Image
import PIL.ImageChops

from data_pipelines.rejection import BadRow
from idefics_jax.errors import UserError
from idefics_jax.image_gate import RejectedImage, parse

# Suffixes of the members that hold the pages, in order of preference.
SOURCES = ("pdf", "tif", "tiff")
DOTS_PER_INCH = 150
LONGEST_SIDE = 1960
# A row holds at most as many pages, so that a book is not one record; pages.py cuts further.
ROW_PAGES = 16
_POINTS_PER_INCH = 72
# A page of A3 at 600 dots per inch.
_MOST_PIXELS = 70_000_000
_JPEG_QUALITY = 90
# A page of letters: 287 KiB in 32 ms, where JPEG takes 514 in 5; level 6 takes 284 in 46. With noise of 4 levels: 1,346
# KiB in 141 ms, where JPEG takes 739 in 7.
_PNG_LEVEL = 4
# How often the objects of a PDF page may cover it, one above the other: a map of contour lines does so hundreds of
# times, and PDFium takes a second for six hundred. A million objects are not drawn in a minute, however small.
_MOST_COVERED, _MOST_OBJECTS = 2000, 1_000_000
_FORM = 5  # FPDF_PAGEOBJ_FORM: objects in a group with a matrix of its own
# Share of the pixels that have one level if the ground is even.
_EVEN = 0.5
# PDFium may be called from one thread at a time.
_pdfium = threading.Lock()


def rows(source: str, data: bytes, annotations: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (part, row) of a document, a row for each run of ROW_PAGES pages; part is "" or "@" and the first page.

    Args:
      source: a suffix in SOURCES.
      data: the member of that suffix.
      annotations: its json.

    Raises:
      BadRow: the json has another layout, its pages are not as many as the images, there is no text at all, or a page
        cannot be rendered (the rows before it have been given).
      UserError: pypdfium2 is not installed.
    """
    texts = page_texts(annotations)
    if not any(text.strip() for text in texts):
        raise BadRow("nothing-trained", "no page has text; drop the document")
    images = _pdf_pages(data, len(texts)) if source == "pdf" else _tiff_pages(data, len(texts))
    for first in range(0, len(texts), ROW_PAGES):
        run = texts[first : first + ROW_PAGES]
        pages = [{"bytes": image, "path": None} for image in itertools.islice(images, len(run))]
        yield f"@{first}" if len(texts) > ROW_PAGES else "", {"images": pages, "texts": run}


def page_texts(annotations: Any) -> list[str]:
    """Returns the text of each page, its lines joined by line feeds; raises BadRow."""
    pages = annotations.get("pages") if isinstance(annotations, dict) else None
    texts = []
    for page in pages if isinstance(pages, list) else ():
        lines = page.get("lines", page) if isinstance(page, dict) else None
        lines = lines.get("text") if isinstance(lines, dict) else None
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise BadRow("bad-json", f"page {len(texts)} of its .json has no list of lines under lines.text or text")
        texts.append("\n".join(lines))
    if not texts:
        raise BadRow("bad-json", "its .json lists no pages; it needs {'pages': [{'lines': {'text': [...]}}]}")
    return texts


def _check_count(found: int, texts: int) -> None:
    if found != texts:
        raise BadRow("lengths-differ", f"it has {found} page images and {texts} pages of text; drop the document")


def _pdf_pages(data: bytes, count: int) -> Iterator[bytes]:
    """Yields the rendered pages of a PDF."""
    try:
        import pypdfium2  # here, because only those who prepare PDFs need it
    except ModuleNotFoundError:
        raise UserError(
            "pypdfium2 renders .pdf pages and is not installed; pip install -r requirements-prepare.txt"
        ) from None
    try:
        with _pdfium:
            document = pypdfium2.PdfDocument(data)
            found = len(document)
        _check_count(found, count)
        for number in range(count):
            with _pdfium:
                page = document[number]
                if _is_covered(page):
                    raise BadRow(
                        "bomb", f"page {number} of its .pdf is drawn over thousands of times; drop the document"
                    )
                image = _rendered(page)
            yield _encoded(image)
    except pypdfium2.PdfiumError as error:
        raise BadRow("corrupt", f"its .pdf cannot be read ({error}); drop the document") from None


def _is_covered(page: Any) -> bool:
    """Whether a page of PDFium's has far more objects than any, or their boxes cover it far more often."""
    width, height = page.get_size()
    covered = 0.0
    for number, drawn in enumerate(page.get_objects()):
        if number > _MOST_OBJECTS:
            return True
        if drawn.type == _FORM:  # what is in it follows
            continue
        box, form = drawn.get_bounds(), drawn.container
        while form is not None:
            box, form = form.get_matrix().on_rect(*box), form.container
        left, bottom, right, top = box
        covered += max(min(right, width) - max(left, 0.0), 0.0) * max(min(top, height) - max(bottom, 0.0), 0.0)
        if covered > _MOST_COVERED * width * height:
            return True
    return False


def _rendered(page: Any) -> PIL.Image.Image:
    """Draws a page of PDFium's."""
    scale = min(DOTS_PER_INCH / _POINTS_PER_INCH, LONGEST_SIDE / max(1.0, *page.get_size()))
    image = page.render(scale=scale * (1 - 1e-9)).to_pil().convert("RGB")  # sizes round up: 450.0000001 would be 451
    page.close()
    return image


def _tiff_pages(data: bytes, count: int) -> Iterator[bytes]:
    """Yields the pages of a TIFF."""
    try:
        scan = parse("TIFF", lambda: PIL.Image.open(io.BytesIO(data), formats=["TIFF"]))
        _check_count(parse("TIFF", lambda: scan.n_frames), count)
        for page in range(count):
            parse("TIFF", lambda page=page: scan.seek(page))
            if scan.width * scan.height > _MOST_PIXELS:
                raise BadRow("bomb", f"page {page} of its .tif is {scan.width} x {scan.height}; drop the document")
            grey = scan.mode in ("1", "L")
            image = parse("TIFF", lambda grey=grey: scan.convert("L" if grey else "RGB"))
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            yield _encoded(image)
    except RejectedImage as error:
        raise BadRow(error.reason, str(error)) from None


def _encoded(image: PIL.Image.Image) -> bytes:
    """Returns a page as a file: PNG if it is grey on an even ground, else JPEG."""
    if image.mode == "RGB":
        red, green, blue = image.split()
        if not any(PIL.ImageChops.difference(red, channel).getbbox() for channel in (green, blue)):
            image = red
    file = io.BytesIO()
    if image.mode == "L" and max(image.histogram()) > _EVEN * image.width * image.height:
        image.save(file, "PNG", compress_level=_PNG_LEVEL)
    else:
        image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
