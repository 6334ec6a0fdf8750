"""Filters take what their names say, on the boundary too, and count it under those names."""

import dataclasses

import pytest

from data_pipelines import filters
from data_pipelines.filters import Filters
from data_pipelines.rejection import BadRow, Ledger, Rejected
from idefics_jax import settings
from idefics_jax.errors import UserError
from tests.data_pipelines.pictures import png

SMALL, SQUARE, LONG = png(149, 300), png(150, 150), png(700, 150)


def page(outline: str, **columns) -> dict:
    """A page of texts (t) and images that all differ (i), or of the images of those names."""
    images = [png(150 + position, 200) if mark == "i" else None for position, mark in enumerate(outline)]
    texts = ["words" if mark == "t" else None for mark in outline]
    return {"images": images, "texts": texts, **columns}


def taken_whole(chosen: Filters, row: dict) -> str | None:
    try:
        filters.apply(chosen, row, "obelics")
    except BadRow as error:
        return error.reason
    return None


@pytest.mark.parametrize(
    ("name", "threshold", "stays", "goes"),
    [
        ("document_min_images", 1, ["it", "iit"], ["t", "tt"]),
        ("document_max_images", 2, ["t", "iti"], ["itiit"]),
        ("document_max_consecutive_images", 2, ["t", "iitiit"], ["iiit", "tiiiti"]),
        ("document_max_trailing_images", 1, ["it", "iiti"], ["itii", "iii"]),
        ("document_min_images_before_text", 1, ["it", "iti"], ["ti", "t", "ii"]),
    ],
)
def test_pages_go_by_where_their_images_stand(name, threshold, stays, goes):
    chosen = Filters(**{name: threshold})
    assert [taken_whole(chosen, page(outline)) for outline in stays] == [None] * len(stays)
    assert [taken_whole(chosen, page(outline)) for outline in goes] == [f"filter:{name}"] * len(goes)


def test_pages_go_by_their_perplexity_and_without_one():
    chosen = Filters(document_max_perplexity=30.0)
    scores = [1.0, 30.0, 30.1, float("nan"), None]
    reasons = [taken_whole(chosen, page("it", perplexity=score)) for score in scores]
    assert reasons == [None, None, *["filter:document_max_perplexity"] * 3]


@pytest.mark.parametrize(
    ("chosen", "kept", "reason"),
    [
        (Filters(image_min_side=150), [SQUARE, LONG, SQUARE], "filter:image_min_side"),
        (Filters(image_max_side=699), [SMALL, SQUARE, SQUARE], "filter:image_max_side"),
        (Filters(image_max_aspect=3.0), [SMALL, SQUARE, SQUARE], "filter:image_max_aspect"),
        (Filters(image_max_repeats=1), [SMALL, SQUARE, LONG], "filter:image_max_repeats"),
    ],
)
def test_an_image_leaves_its_page_and_the_rest_stays_in_order(chosen, kept, reason):
    row = {"images": [SMALL, None, SQUARE, LONG, None, SQUARE], "texts": [None, "a", None, None, "b", None], "id": 1}
    left, taken = filters.apply(chosen, row, "obelics")
    assert [image for image in left["images"] if image] == kept
    assert [text for text in left["texts"] if text] == ["a", "b"]
    assert all((image is None) != (text is None) for image, text in zip(left["images"], left["texts"], strict=True))
    assert taken == {reason: 1}
    assert left["id"] == 1


def test_a_page_is_judged_by_the_images_that_are_left():
    row = {"images": [SMALL, None, SMALL], "texts": [None, "words", None]}
    assert taken_whole(Filters(document_min_images=1), row) is None
    assert taken_whole(Filters(document_min_images=1, image_min_side=150), row) == "filter:document_min_images"


def test_a_page_of_which_nothing_is_left_was_filtered():
    row = {"images": [SMALL, SMALL], "texts": [None, None]}
    assert taken_whole(Filters(image_min_side=150), row) == "filter:document_emptied"


def test_an_image_that_cannot_be_read_is_left_to_the_gate():
    row = {"images": [b"", b"GIF8", SQUARE[:20], None], "texts": [None, None, None, "words"]}
    left, taken = filters.apply(Filters(image_min_side=150), row, "obelics")
    assert left == row
    assert not taken


def test_a_pair_goes_with_its_image():
    chosen = Filters(image_min_side=150)
    assert filters.apply(chosen, {"image": SQUARE, "caption": "c"}, "pairs")[0]["image"] == SQUARE
    with pytest.raises(BadRow) as refused:
        filters.apply(chosen, {"image": SMALL, "caption": "c"}, "pairs")
    assert refused.value.reason == "filter:image_min_side"


def test_what_filters_take_does_not_count_as_damage():
    ledger = Ledger(limit=0.01, seen=1200)
    for number in range(9000):
        ledger.seen += 1
        ledger.reject(Rejected(str(number), "filter:document_max_images", "too many"))
    assert ledger.rejected == {"filter:document_max_images": 9000}
    for _ in range(12):
        ledger.reject(Rejected("bad", "truncated", "cut"))
    with pytest.raises(UserError, match=r"13 of 1200 documents were rejected \(truncated 13\)"):
        ledger.reject(Rejected("bad", "truncated", "cut"))


def test_every_filter_has_a_threshold_on_the_command_line():
    names = [field.name for field in dataclasses.fields(Filters)]
    assert filters.parse(",".join(f"{name}=1" for name in names)) == Filters(**dict.fromkeys(names, 1))
    assert filters.parse("") == Filters()
    for text, message in [
        ("image_min_sid=3", r"no filter 'image_min_sid'; did you mean 'image_min_side'\? there are image_min_side, im"),
        ("image_min_side", "write image_min_side=NUMBER"),
        ("image_min_side=1.5", "the threshold '1.5'"),
        ("image_min_side=-1", "must be a number and not negative"),
        ("document_max_perplexity=nan", "must be a number and not negative"),
        ("image_max_aspect=0.5", "must be at least 1"),
        ("document_max_missing_images=7", "is 7.0; it is a share of a page's images, at most 1"),
        ("image_min_side=200,image_min_side=2", "image_min_side is given twice"),
    ]:
        with pytest.raises(UserError, match=message):
            filters.parse(text)


def test_a_config_names_filters_as_settings():
    assert settings.build(Filters, {"image_min_side": 150}, "f").named == ("image_min_side",)
    with pytest.raises(UserError, match="did you mean 'image_min_side'"):
        settings.build(Filters, {"image_minside": 150}, "f")


def test_filters_of_another_kind_are_refused():
    filters.check_kind(Filters(image_min_side=150), "pairs", where="source 'a'")
    for chosen, kind, message in [
        (Filters(document_max_images=3), "pairs", "not for kind 'pairs', which has only image_min_side, image_max_s"),
        (Filters(image_min_side=3), "cauldron", "not for kind 'cauldron', which has none"),
    ]:
        with pytest.raises(UserError, match=message):
            filters.check_kind(chosen, kind, where="source 'a'")
