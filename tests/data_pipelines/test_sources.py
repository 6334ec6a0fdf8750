import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import cauldron, obelics, pairs
from data_pipelines.cache import Cache
from data_pipelines.rejection import Rejected
from data_pipelines.row_groups import RowGroups
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import DocumentSource, read_documents
from idefics_jax.errors import UserError


def write(path, schema, rows, **options) -> str:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)
    return str(path)


def talk(answer="4") -> dict:
    return {"images": [], "texts": [{"user": "2 + 2?", "assistant": answer, "source": "sums"}]}


def open_source(config: SourceConfig) -> DocumentSource:
    return DocumentSource(
        config,
        prepare=lambda document: document,
        prepared_size=lambda document: 1,
        cache=Cache(0),
        row_groups=RowGroups(max_bytes=0),
        seed=0,
        shards=1,
        shards_here=1,
    )


def test_other_columns_are_refused_with_those_found_and_those_accepted(tmp_path):
    schema = pa.schema([("image", pa.binary()), ("question", pa.string())])
    path = write(tmp_path / "vqa.parquet", schema, [{"image": b"", "question": "?"}])
    with pytest.raises(UserError) as refused:
        open_source(SourceConfig("mine", "cauldron", (path,)))
    message = str(refused.value)
    assert "vqa.parquet" in message
    assert "image binary, question string" in message
    for column in ("cauldron: images list<", "user: string", "obelics: images list<", "pairs: key string"):
        assert column in message
    assert "\n" not in message


def test_a_file_of_another_kind_is_refused_with_its_kind(tmp_path):
    path = write(tmp_path / "pages.parquet", obelics.SCHEMA, [{"images": [None], "texts": ["words"]}])
    with pytest.raises(UserError, match="set kind to 'obelics'"):
        open_source(SourceConfig("mine", "cauldron", (path,)))


def test_columns_of_another_type_are_refused(tmp_path):
    schema = pa.schema([("images", pa.list_(pa.binary())), cauldron.SCHEMA.field("texts")])
    path = write(tmp_path / "a.parquet", schema, [talk()])
    with pytest.raises(UserError, match="not those of kind 'cauldron'"):
        open_source(SourceConfig("mine", "cauldron", (path,)))


def test_every_file_of_a_glob_is_checked(tmp_path):
    write(tmp_path / "0.parquet", cauldron.SCHEMA, [talk()])
    write(tmp_path / "1.parquet", obelics.SCHEMA, [{"images": [None], "texts": ["words"]}])
    with pytest.raises(UserError, match=r"1\.parquet"):
        open_source(SourceConfig("mine", "cauldron", (str(tmp_path / "*.parquet"),)))


def test_files_without_rows_are_refused(tmp_path):
    path = write(tmp_path / "none.parquet", cauldron.SCHEMA, [])
    with pytest.raises(UserError, match="hold no rows"):
        open_source(SourceConfig("mine", "cauldron", (path,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "webdataset"}, "must be one of cauldron, obelics, pairs"),
        ({"paths": ()}, "paths is empty"),
        (
            {"image_root": "gs://b/images"},
            "image_root is .gs://b/images.; images are read from a disk",
        ),
        ({"weight": 0.0}, "weight is 0.0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SourceConfig("mine", "cauldron", ("a",)), **change)


def test_extra_columns_and_large_types_are_read(tmp_path):
    image = pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary()), ("width", pa.int32())])
    turn = pa.struct([("user", pa.string()), ("assistant", pa.string())])
    schema = pa.schema([("id", pa.int64()), ("texts", pa.large_list(turn)), ("images", pa.large_list(image))])
    row = {
        "id": 1,
        "images": [{"bytes": b"x", "path": None, "width": 1}],
        "texts": [{"user": "?", "assistant": "!"}],
    }
    path = write(tmp_path / "a.parquet", schema, [row])
    (document,) = read_documents(SourceConfig("mine", "cauldron", (path,)))
    row.pop("id")
    assert document.parts == cauldron.parts(row, None)


def test_pairs_with_and_without_their_status_are_read_together(tmp_path):
    told = pairs.SCHEMA.append(pairs.STATUS)
    rows = [{"png": b"x", "caption": "a cat"}, {"caption": "a dog", "status": "failed_to_download"}]
    paths = (
        write(tmp_path / "0.parquet", pairs.SCHEMA, rows[:1]),
        write(tmp_path / "1.parquet", told, rows),
    )
    source = open_source(SourceConfig("mine", "pairs", paths))
    found = [piece for i in range(3) for piece in source.read(0, i)]
    assert sorted(getattr(one, "reason", "document") for one in found) == ["document"] * 2 + [pairs.NOT_DOWNLOADED]


def test_bad_rows_are_values_and_good_ones_keep_their_place(tmp_path):
    path = write(tmp_path / "a.parquet", cauldron.SCHEMA, [talk(), talk(None), talk("5")])
    source = open_source(SourceConfig("mine", "cauldron", (path,)))
    read = [source.read(0, i)[0] for i in range(3)]
    bad = [element for element in read if isinstance(element, Rejected)]
    assert [(element.name, element.reason) for element in bad] == [("mine/a.parquet:1", "null-text")]
    assert sorted(element.id for element in read if element not in bad) == ["a.parquet:0", "a.parquet:2"]


def test_text_that_is_not_utf8_is_a_bad_row(tmp_path):
    texts = pa.array([["fine"], ["fine"]], pa.list_(pa.binary()))
    texts = pa.ListArray.from_arrays(texts.offsets, pa.array([b"fine", b"\xff\xfe"]).view(pa.string()))
    table = pa.Table.from_arrays([pa.array([[None], [None]], pa.list_(pa.string())), texts], ["images", "texts"])
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(SourceConfig("mine", "obelics", (str(tmp_path / "a.parquet"),)))
    reasons = [getattr(source.read(0, i)[0], "reason", None) for i in range(2)]
    assert sorted(reasons, key=str) == [None, "not-utf8"]


def test_a_damaged_row_group_is_a_bad_row_each(tmp_path):
    rows = [talk(str(i) * 50) for i in range(20)]
    path = write(
        tmp_path / "a.parquet",
        cauldron.SCHEMA,
        rows,
        row_group_size=10,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[data.index(b"5" * 50)] ^= 1
    (tmp_path / "a.parquet").write_bytes(data)
    source = open_source(SourceConfig("mine", "cauldron", (path,)))
    reasons = [getattr(source.read(0, i)[0], "reason", None) for i in range(20)]
    assert reasons.count("damaged-parquet") == 10
    assert reasons.count(None) == 10


def test_evaluation_reads_every_document_in_order_and_stops_at_a_bad_one(tmp_path):
    path = write(tmp_path / "a.parquet", cauldron.SCHEMA, [talk(str(i)) for i in range(25)], row_group_size=10)
    config = SourceConfig("mine", "cauldron", (path,))
    assert [document.id for document in read_documents(config)] == [f"a.parquet:{i}" for i in range(25)]
    write(tmp_path / "a.parquet", cauldron.SCHEMA, [talk(), talk(None)])
    with pytest.raises(UserError, match=r"mine/a.parquet:1 cannot be used \(turn 0 lacks"):
        list(read_documents(config))
