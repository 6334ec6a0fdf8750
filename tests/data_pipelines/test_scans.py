"""Scanned documents: pages rendered in order beside their text, in the layouts of OCR-IDL and PDFA."""

import io
import sys
import zlib

import numpy as np
import PIL.Image
import pytest
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data_pipelines import pages, scans, tar
from data_pipelines.rejection import BadRow, Rejected
from idefics_jax.documents import Image, Text
from idefics_jax.errors import UserError
from tests.data_pipelines.tars import as_json, idl, pdfa, tiff, write_tar

TEXTS = [["First page", "has two lines"], [], ["third"]]


def pdf(sizes, colour="black") -> bytes:
    """A PDF whose page i, of (width, height) in inches, shows i + 1 bars."""
    file = io.BytesIO()
    with PdfPages(file) as document:
        for i, size in enumerate(sizes):
            figure = Figure(figsize=size)
            for bar in range(i + 1):
                figure.add_artist(_bar(0.1 + 0.2 * bar, colour))
            document.savefig(figure)
    return file.getvalue()


def _bar(y, colour):
    return Rectangle((0.1, y), 0.8, 0.1, color=colour)


def opened(row) -> list[PIL.Image.Image]:
    return [PIL.Image.open(io.BytesIO(image["bytes"])) for image in row["images"]]


def bars(image: PIL.Image.Image) -> int:
    """How many dark bars there are from top to bottom."""
    dark = np.asarray(image.convert("L"))[:, image.width // 2] < 128
    return int((np.diff(np.concatenate([[0], dark])) == 1).sum())


THREE = pdf([(2, 3)] * 3)


@pytest.mark.parametrize(("suffix", "data"), [("pdf", THREE), ("tif", tiff([(300, 450)] * 3))])
@pytest.mark.parametrize("layout", [idl, pdfa])
def test_a_document_is_its_pages_in_order_with_the_text_of_each(tmp_path, suffix, data, layout):
    path = write_tar(tmp_path / "s.tar", [(f"d.{suffix}", data), ("d.json", layout(TEXTS)), ("d.ocr", b"old")])
    ((name, row),) = tar.read(path, "pdf")
    assert name == "s.tar:d"
    assert row["texts"] == ["First page\nhas two lines", "", "third"]
    assert [image.size for image in opened(row)] == [(300, 450)] * 3
    if suffix == "pdf":
        assert [bars(image) for image in opened(row)] == [1, 2, 3]
    else:
        tops = [int(np.argmin(np.asarray(image)[:, 0])) for image in opened(row)]
        assert tops == [0, 10, 20]
    *images, text = pages.parts(row, None)
    assert [type(image) for image in images] == [Image] * 3
    assert text == Text("First page\nhas two lines\n\nthird", trained=True)


def test_the_pdf_is_taken_where_there_is_a_tif_too(tmp_path):
    contents = [("d.tif", b"no tiff"), ("d.json", idl([["a"]])), ("d.pdf", pdf([(2, 3)]))]
    ((_, row),) = tar.read(write_tar(tmp_path / "s.tar", contents), "pdf")
    assert opened(row)[0].size == (300, 450)


def test_grey_pages_are_png_and_coloured_or_noisy_ones_jpeg():
    grey, coloured = (
        dict(scans.rows("pdf", pdf([(2, 3)], colour), {"pages": [{"text": ["a"]}]}))[""] for colour in ("0.3", "red")
    )
    assert [image.format for image in (*opened(grey), *opened(coloured))] == ["PNG", "JPEG"]
    assert opened(grey)[0].mode == "L"
    noise = np.random.default_rng(0).integers(200, 256, (50, 40), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noise).save(file, "TIFF")
    noisy = dict(scans.rows("tif", file.getvalue(), {"pages": [{"text": ["a"]}]}))[""]
    assert (opened(noisy)[0].format, opened(noisy)[0].mode) == ("JPEG", "L")
    assert opened(coloured)[0].getpixel((150, 375)) == pytest.approx((254, 0, 0), abs=3)


@pytest.mark.parametrize(
    ("inches", "size"), [((8.5, 11), (1275, 1650)), ((8.5, 14), (1190, 1960)), ((90, 2), (1960, 44))]
)
def test_pdf_pages_have_150_dots_per_inch_up_to_a_longest_side(inches, size):
    row = dict(scans.rows("pdf", pdf([inches]), {"pages": [{"text": ["a"]}]}))[""]
    assert opened(row)[0].size == size


def test_tiff_pages_are_scaled_down_and_never_up():
    data = tiff([(3920, 1000), (60, 70)], "L")
    row = dict(scans.rows("tif", data, {"pages": [{"text": ["a"]}, {"text": ["b"]}]}))[""]
    assert [image.size for image in opened(row)] == [(1960, 500), (60, 70)]


def test_a_book_becomes_several_rows():
    texts = [[f"page {i}"] for i in range(35)]
    found = dict(scans.rows("tif", tiff([(20 + i, 400) for i in range(35)]), {"pages": [{"text": t} for t in texts]}))
    assert list(found) == ["@0", "@16", "@32"]
    assert [len(row["images"]) for row in found.values()] == [16, 16, 3]
    assert [text for row in found.values() for text in row["texts"]] == [text for (text,) in texts]
    assert [image.width for row in found.values() for image in opened(row)] == [20 + i for i in range(35)]


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ([("d.json", idl(TEXTS))], "null-image"),
        ([("d.pdf", THREE)], "null-image"),
        ([("d.pdf", THREE), ("d.json", idl(TEXTS[:2]))], "lengths-differ"),
        ([("d.pdf", THREE), ("d.json", idl([*TEXTS, ["more"]]))], "lengths-differ"),
        ([("d.tif", tiff([(9, 9)])), ("d.json", idl(TEXTS))], "lengths-differ"),
        ([("d.pdf", THREE), ("d.json", idl([[], [" "], []]))], "nothing-trained"),
        ([("d.pdf", THREE[:900]), ("d.json", idl(TEXTS))], "corrupt"),
        ([("d.pdf", b""), ("d.json", idl(TEXTS))], "corrupt"),
        ([("d.pdf", b"%PDF-1.4 no more"), ("d.json", idl(TEXTS))], "corrupt"),
        ([("d.tif", tiff([(90, 90)] * 3)[:60]), ("d.json", idl(TEXTS))], "corrupt"),
        ([("d.tif", b"\x89PNG\r\n\x1a\n"), ("d.json", idl(TEXTS))], "corrupt"),
        ([("d.pdf", THREE), ("d.json", as_json([]))], "bad-json"),
        ([("d.pdf", THREE), ("d.json", as_json({"pages": 3}))], "bad-json"),
        ([("d.pdf", THREE), ("d.json", as_json({"pages": []}))], "bad-json"),
        ([("d.pdf", THREE), ("d.json", as_json({"pages": [None, 1, []]}))], "bad-json"),
        ([("d.pdf", THREE), ("d.json", as_json({"pages": [{"text": "a"}] * 3}))], "bad-json"),
        ([("d.pdf", THREE), ("d.json", as_json({"pages": [{"lines": {"text": [None]}}] * 3}))], "bad-json"),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_what_is_no_document_is_named_by_reason(tmp_path, contents, reason):
    ((name, row),) = tar.read(write_tar(tmp_path / "s.tar", contents), "pdf")
    assert isinstance(row, Rejected)
    assert (name, row.name, row.reason) == ("s.tar:d", "s.tar:d", reason)


def test_a_tiff_that_claims_too_many_pixels_is_not_decoded():
    file = io.BytesIO()
    PIL.Image.new("1", (10_000, 8_000)).save(file, "TIFF", compression="group4")
    with pytest.raises(BadRow, match="10000 x 8000") as refused:
        list(scans.rows("tif", file.getvalue(), {"pages": [{"text": ["a"]}]}))
    assert refused.value.reason == "bomb"


def drawn(content: bytes, *, matrix: str = "") -> bytes:
    """A PDF of one page of 800 x 800 points, what is drawn on it in a group with a matrix if one is given."""
    group = f"<</Type/XObject/Subtype/Form/BBox[0 0 800 800]/Matrix[{matrix}]".encode()
    packed = zlib.compress(content, 9)
    stream = b"/Filter/FlateDecode/Length %d>>stream\n%b\nendstream endobj\n" % (len(packed), packed)
    objects = [b"<</Type/Catalog/Pages 2 0 R>>endobj\n", b"<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"]
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 800 800]/Contents 4 0 R/Resources<</XObject<</X 5 0 R>>>>>>endobj\n"
    if matrix:
        objects += [page, b"<</Length 4>>stream\n/X Do\nendstream endobj\n", group + stream]
    else:
        objects += [page, b"<<" + stream]
    numbered = b"".join(b"%d 0 obj" % number + body for number, body in enumerate(objects, 1))
    return b"%PDF-1.4\n" + numbered + b"trailer<</Root 1 0 R>>\n%%EOF"


@pytest.mark.parametrize(
    ("content", "matrix", "is_bomb"),
    [
        (b"0 0 800 800 re f\n" * 5000, "", True),
        (b"0 0 8 8 re f\n" * 5000, "", False),
        (b"0 0 8 8 re f\n" * 5000, "1 0 0 1 0 0", False),
        (b"0 0 8 8 re f\n" * 5000, "100 0 0 100 0 0", True),
        (b"-900 -900 9000 9000 re f\n" * 100, "", False),
    ],
)
def test_a_pdf_page_that_is_drawn_over_thousands_of_times_is_a_bomb(content, matrix, is_bomb):
    """518 bytes of them took 8.6 s, and more of them as much longer."""
    document = drawn(content, matrix=matrix)
    if is_bomb:
        with pytest.raises(BadRow, match="page 0 of its .pdf is drawn over thousands of times") as refused:
            list(scans.rows("pdf", document, {"pages": [{"text": ["a"]}]}))
        assert refused.value.reason == "bomb"
    else:
        ((_, row),) = scans.rows("pdf", document, {"pages": [{"text": ["a"]}]})
        assert np.asarray(PIL.Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("L")).min() == 0


def test_only_pdf_pages_ask_for_pypdfium2_and_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    annotations = {"pages": [{"text": ["a"]}]}
    assert len(list(scans.rows("tif", tiff([(9, 9)]), annotations))) == 1
    with pytest.raises(UserError, match=r"pip install -r requirements-prepare\.txt"):
        list(scans.rows("pdf", pdf([(1, 1)]), annotations))
