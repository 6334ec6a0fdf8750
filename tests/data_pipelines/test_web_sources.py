"""Web pages and pairs read with filters, missing images and several captions, as training reads them."""

import dataclasses
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import image_index, obelics, pairs
from data_pipelines.cache import Cache
from data_pipelines.filters import Filters
from data_pipelines.pipeline import Stage, batches
from data_pipelines.prepare import open_inputs
from data_pipelines.rejection import Rejected
from data_pipelines.row_groups import RowGroups
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import DocumentSource, read_documents
from data_pipelines.units import Recipe, prepare_unit
from idefics_jax.documents import Image, Text
from idefics_jax.errors import UserError
from tests.data_pipelines.pictures import png
from tests.data_pipelines.stores import write_webdataset


def write(path, rows, schema) -> str:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return str(path)


def elements(config: SourceConfig, count: int, seed=0) -> list[tuple]:
    source = DocumentSource(
        config,
        prepare=lambda document: document,
        prepared_size=lambda document: 1,
        cache=Cache(2**20),
        row_groups=RowGroups(max_bytes=0),
        seed=seed,
        shards=1,
        shards_here=1,
    )
    return [source.read(0, index) for index in range(count)]


def url(number: int) -> str:
    return f"https://example.com/{number}.png"


def test_images_that_come_or_go_between_saving_and_restoring_are_told(config, processor, tmp_path):
    """Where pages may lack images, they would change batches without a word."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for n in range(20):
        (folder / f"{n}.png").write_bytes(png(28 + n, 40))
    rows = [{"images": [f"a/{n}.png", None], "texts": [None, f"page {n}"]} for n in range(20)]
    filters = Filters(document_max_missing_images=1.0)
    path, root = write(tmp_path / "pages.parquet", rows, obelics.SCHEMA), str(tmp_path / "images")
    source = SourceConfig("web", "obelics", (path,), image_root=root, filters=filters)
    config = dataclasses.replace(config, stages=(Stage((source,)),), virtual_shards=1)

    def start():
        return batches(config, processor, process_index=0, process_count=1)

    state = start().get_state()
    (folder / "7.png").rename(tmp_path / "7.png")
    with pytest.raises(UserError, match=r"files.web.digest: '\w+' -> '\w+'"):
        start().set_state(state)
    (tmp_path / "7.png").rename(folder / "7.png")
    start().set_state(state)


@pytest.fixture
def pages(tmp_path) -> SourceConfig:
    """Ten pages of two images and a text; the second image of the even ones is missing. Images grow with the page."""
    fetched = [(url(n), None if n % 4 == 1 else png(30 + n, 40)) for n in range(20)]
    tar = write_webdataset(tmp_path / "0.tar", fetched)
    image_index.build([tar], str(tmp_path / "index"), sha256="stored", processes=1, keep_cut_short=False)
    rows = [
        {"images": [url(2 * n), None, url(2 * n + 1)], "texts": [None, f"page {n}", None], "perplexity": 10.0 * n}
        for n in range(10)
    ]
    path = write(tmp_path / "pages.parquet", rows, obelics.SCHEMA.append(pa.field("perplexity", pa.float32())))
    return SourceConfig("web", "obelics", (path,), image_root=str(tmp_path / "index"))


def by_reason(read: list[tuple]) -> dict[str, int]:
    reasons = [one.reason for element in read for one in element if isinstance(one, Rejected)]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def test_a_missing_image_costs_its_page_unless_a_share_may_be_missing(pages):
    assert by_reason(elements(pages, 10)) == {"missing-image": 5}
    tolerant = dataclasses.replace(pages, filters=Filters(document_max_missing_images=0.5))
    read = elements(tolerant, 10)
    assert by_reason(read) == {"filter:image_missing": 5}
    documents = {element[0].id: element[0].parts for element in read}
    assert documents["pages.parquet:2"] == (Image(png(34, 40)), Text("page 2", trained=True))
    assert len(documents["pages.parquet:3"]) == 3
    strict = dataclasses.replace(pages, filters=Filters(document_max_missing_images=0.4))
    assert by_reason(elements(strict, 10)) == {"filter:document_max_missing_images": 5}


@pytest.mark.parametrize(("count", "told"), [(10, "the 20 images that its first 10"), (300, "the 256 images that its")])
def test_a_folder_without_one_of_the_images_stops_the_run(pages, tmp_path, count, told):
    rows = [{"images": [url(2 * n), None, url(2 * n + 1)], "texts": [None, f"page {n}", None]} for n in range(count)]
    (tmp_path / "empty").mkdir()
    wrong = dataclasses.replace(
        pages,
        paths=(write(tmp_path / "more.parquet", rows, obelics.SCHEMA),),
        image_root=str(tmp_path / "empty"),
        filters=Filters(document_max_missing_images=1.0),
    )
    with pytest.raises(UserError, match=rf"{told}.*image_root = '.*empty'; name the folder"):
        elements(wrong, count)
    (tmp_path / "empty" / hashlib.sha256(url(0).encode()).hexdigest()).write_bytes(png(30, 40))
    if count == 10:
        assert by_reason(elements(wrong, 10)) == {"filter:image_missing": 19}


def test_every_filter_counts_what_it_takes_by_its_own_name(pages):
    chosen = Filters(
        image_min_side=37, document_max_missing_images=1.0, document_min_images=1, document_max_perplexity=55.0
    )
    read = elements(dataclasses.replace(pages, filters=chosen), 10)
    assert by_reason(read) == {
        "filter:document_max_perplexity": 4,
        "filter:document_min_images": 3,  # pages 0 to 2, whose images are too small or missing
        "filter:image_min_side": 1,  # of page 3; those of pages that go are not counted
        "filter:image_missing": 1,  # of page 4
    }
    kept = sorted(element[0].id for element in read if not isinstance(element[0], Rejected))
    assert kept == [f"pages.parquet:{n}" for n in (3, 4, 5)]


def test_filters_need_their_columns(pages, tmp_path):
    plain = write(tmp_path / "plain.parquet", [{"images": [None], "texts": ["a"]}], obelics.SCHEMA)
    chosen = dataclasses.replace(pages, paths=(plain,), filters=Filters(document_max_perplexity=3.0))
    with pytest.raises(
        UserError, match="plain.parquet of source 'web' has no column perplexity double, which its filt"
    ):
        elements(chosen, 1)


CAPTIONED = pairs.SCHEMA.append(pa.field("made", pa.string()))


@pytest.fixture
def captioned(tmp_path) -> SourceConfig:
    rows = [
        {"key": str(n), "png": png(28, 28), "caption": f"alt {n}", "url": "u", "made": f"made {n}" if n % 10 else None}
        for n in range(200)
    ]
    path = write(tmp_path / "pairs.parquet", rows, CAPTIONED)
    return SourceConfig("two", "pairs", (path,), captions=(("caption", 0.25), ("made", 0.75)))


def captions(read: list[tuple]) -> dict[str, str]:
    return {element[0].id: element[0].parts[1].text for element in read}


def test_captions_are_drawn_by_share_anew_each_epoch_and_alike_on_resuming(captioned):
    read = elements(captioned, 400)
    first, second = captions(read[:200]), captions(read[200:])
    made = sum(text.startswith("made") for text in first.values())
    assert 110 < made < 160  # 0.75 of the 180 that have one
    assert first != second
    assert captions(elements(captioned, 400)[200:]) == second
    assert all(text.split()[1] == name.split(":")[1] for name, text in first.items())
    assert all(first[f"pairs.parquet:{n}"] == f"alt {n}" for n in range(0, 200, 10))


def test_prepared_pairs_keep_their_captions_to_choose_from(captioned, tmp_path):
    recipe = Recipe("pairs", None, Filters(), captions=(), features={}, max_pixels=10**6, shard_mib=1)
    preparation = open_inputs(recipe, list(captioned.paths), tmp_path / "shards")
    with preparation.begun():
        preparation.finish([prepare_unit(unit) for unit in preparation.units], 0.0, keep_cut_short=False)
    read = elements(dataclasses.replace(captioned, paths=(str(tmp_path / "shards"),)), 200)
    assert 110 < sum(text.startswith("made") for text in captions(read).values()) < 160


def test_downloads_that_failed_are_counted_by_that_and_are_no_damage(tmp_path):
    schema = pa.schema([("jpg", pa.binary()), ("caption", pa.string()), ("status", pa.string())])
    statuses = ["success", "failed_to_download", "failed_to_resize", "success"]
    rows = [
        {"jpg": png(28, 28) if status == "success" else None, "caption": "c", "status": status} for status in statuses
    ]
    source = SourceConfig("mine", "pairs", (write(tmp_path / "pairs.parquet", rows, schema),))
    assert by_reason(elements(source, 4)) == {"filter:not_downloaded": 2}
    recipe = Recipe("pairs", None, Filters(), captions=(), features={}, max_pixels=10**6, shard_mib=1)
    preparation = open_inputs(recipe, list(source.paths), tmp_path / "shards")
    with preparation.begun():
        told = preparation.finish([prepare_unit(unit) for unit in preparation.units], 0.0, keep_cut_short=False)
    assert (told["documents"], told["dropped"]) == (2, {})
    assert told["filtered"]["filter:not_downloaded"]["documents"] == 2


def test_evaluation_takes_the_first_caption(captioned):
    assert next(iter(read_documents(captioned))).parts[1].text == "alt 0"


def test_captions_that_cannot_be_are_refused(captioned):
    for change, message in [
        ({"captions": (("nope", 1.0),)}, "has no column nope string, which its captions need; it has key string, png"),
        ({"captions": (("made", 0.0),)}, "the share of caption 'made' is 0.0"),
        ({"kind": "obelics"}, "captions are for kind 'pairs'"),
        ({"filters": Filters(document_min_images=1)}, "not for kind 'pairs'"),
    ]:
        with pytest.raises(UserError, match=message):
            elements(dataclasses.replace(captioned, **change), 1)


def test_a_resumed_run_repeats_captions_and_what_filters_took(one_source, processor, captioned, tmp_path):
    """Through the whole pipeline: two captions, and images of which some are too small."""
    rows = [
        {"png": png(28 + n % 3, 28), "caption": "three", "made": "seven of them", "key": "", "url": ""}
        for n in range(9)
    ]
    config = one_source(rows, "pairs", CAPTIONED)
    source = dataclasses.replace(
        config.stages[0].sources[0],
        captions=(("caption", 1.0), ("made", 1.0)),
        filters=Filters(image_max_side=29),
    )
    config = dataclasses.replace(config, stages=(Stage((source,)),))
    data = batches(config, processor, process_index=0, process_count=1)
    for _ in range(2):
        next(data)
    state = json.loads(json.dumps(data.get_state()))
    expected = [next(data) for _ in range(3)]
    again = batches(config, processor, process_index=0, process_count=1)
    again.set_state(state)
    for batch in expected:
        resumed = next(again)
        assert resumed.documents == batch.documents
        assert resumed.rejected == batch.rejected
        assert (resumed.arrays["tokens"] == batch.arrays["tokens"]).all()
    assert set(expected[-1].rejected) == {"filter:image_max_side"}


def test_pages_prepared_with_their_images_are_the_pages_read_with_them(pages, tmp_path):
    chosen = Filters(image_min_side=37, document_max_missing_images=0.5, document_min_images=1)
    recipe = Recipe("obelics", pages.image_root, chosen, captions=(), features={}, max_pixels=10**6, shard_mib=1)
    preparation = open_inputs(recipe, list(pages.paths), tmp_path / "shards")
    with preparation.begun():
        told = preparation.finish([prepare_unit(unit) for unit in preparation.units], 0.0, keep_cut_short=False)
    prepared = dataclasses.replace(pages, paths=(str(tmp_path / "shards"),), image_root=None)
    read = elements(dataclasses.replace(pages, filters=chosen), 10)
    expected = {element[0].id: element[0].parts for element in read if not isinstance(element[0], Rejected)}
    assert len(expected) == 7
    assert [one.parts for one in read_documents(prepared)] == [expected[name] for name in sorted(expected)]
    assert told["dropped"] == {}
    assert {reason: one["documents"] for reason, one in told["filtered"].items()} == {"filter:document_min_images": 3}
    assert told["filtered_images"] == {"filter:image_min_side": 1, "filter:image_missing": 3}
    scored = dataclasses.replace(prepared, filters=Filters(document_max_perplexity=35.0))
    assert by_reason(elements(scored, 7)) == {"filter:document_max_perplexity": 6}


def test_a_folder_of_images_that_is_not_there_is_refused_at_once(pages):
    lost = dataclasses.replace(pages, image_root=f"{pages.image_root}s")
    with pytest.raises(UserError, match=r"source 'web': image_root is '.*/indexs', which is no folder"):
        elements(lost, 1)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_source_whose_every_document_is_filtered_ends_in_a_sentence(config, processor, pages, tmp_path, threads):
    """As when images lie elsewhere and are allowed to be missing: nothing is damaged, and nothing is left."""
    (tmp_path / "empty").mkdir()
    chosen = Filters(document_max_missing_images=1.0, document_min_images=1)
    barren = dataclasses.replace(pages, image_root=str(tmp_path / "empty"), filters=chosen)
    one = dataclasses.replace(config, stages=(Stage((barren,)),), num_threads=threads)
    with pytest.raises(UserError, match=r"source 'web' gave no document in 100 rows .*document_min_images 100"):
        next(batches(one, processor, process_index=0, process_count=1))


def test_a_source_that_gives_a_document_now_and_then_is_read_on(pages):
    chosen = dataclasses.replace(pages, filters=Filters(document_max_perplexity=0.0, document_max_missing_images=1.0))
    read = elements(chosen, 500)
    assert sum(not isinstance(pieces[0], Rejected) for pieces in read) == 50
