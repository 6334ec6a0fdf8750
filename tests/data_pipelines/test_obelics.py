import hashlib

import pytest

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
