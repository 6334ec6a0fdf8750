import dataclasses
import threading

import msgpack
import numpy as np
import pytest

from data_pipelines import manifest, records
from data_pipelines.cache import Cache
from data_pipelines.records import RecordRows, decode, encode, write_shards
from data_pipelines.rejection import BadRow, Rejected
from data_pipelines.row_groups import RowGroups
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import DocumentSource, read_documents
from idefics_jax.errors import UserError

COLUMNS = {"messages": [{"role": "text", "content": "text"}]}


def talk(answer: str) -> dict:
    return {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer}]}


def write(folder, rows, *, shard_bytes=2**20, columns=COLUMNS, kind="text"):
    """Writes rows as prepare does, one shard after another, and their manifest."""
    folder.mkdir(exist_ok=True)
    found = (record if isinstance(record, bytes) else encode(f"a:{i}", record) for i, record in enumerate(rows))
    shards = write_shards(found, folder, prefix="00000", shard_bytes=shard_bytes)
    told = {
        "format": manifest.FORMAT,
        "kind": kind,
        "columns": columns,
        "shards": [shard.told() for shard in shards],
        "digest": manifest.digest_of(shards),
    }
    manifest.write_json(folder / manifest.MANIFEST, told)
    return shards


def open_source(*paths, **changes) -> DocumentSource:
    return DocumentSource(
        dataclasses.replace(SourceConfig("mine", "text", tuple(map(str, paths))), **changes),
        prepare=lambda document: document,
        prepared_size=lambda document: 1,
        cache=Cache(0),
        row_groups=RowGroups(max_bytes=0),
        seed=0,
        shards=1,
        shards_here=1,
    )


def test_a_shard_is_not_read_twice_by_way_of_a_link_or_of_its_folder(tmp_path):
    (shard,) = write(tmp_path / "a", [talk("4")])
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for paths in [(tmp_path / "a", tmp_path / "link" / shard.path.name), (shard.path, tmp_path / "link")]:
        with pytest.raises(UserError, match="are the same shard; name it once"):
            open_source(*paths)


def test_records_come_back_as_they_were():
    row = {"images": [None, b"\x00\xff", b""], "texts": ["é<image>\x00", None, ""], "score": 0.1 + 0.2}
    columns = {"images": ["bytes"], "texts": ["text"], "score": "number"}
    assert decode(encode("a:1", row), columns) == ("a:1", row)
    assert decode(encode("a:1", {"texts": []}), columns) == ("a:1", {"images": None, "texts": [], "score": None})


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\xc1",
        b"\x80\x80",
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x82\xa2id\xa1a\xa3row\x81\xa8messages\xa2\xff\xff",
        msgpack.packb({1: "a"}),
        msgpack.packb([1]),
        msgpack.packb({"id": 1, "row": {}}),
        msgpack.packb({"id": "a", "row": []}),
        msgpack.packb({"id": "a", "row": {"messages": "x"}}),
        msgpack.packb({"id": "a", "row": {"messages": [{"role": 1}]}}),
        msgpack.packb({"id": "a", "row": {"messages": [msgpack.Timestamp(1)]}}),
        msgpack.packb({"id": "a", "row": {"messages": msgpack.ExtType(5, b"x")}}),
    ],
)
def test_what_is_no_record_of_the_columns_is_a_bad_row(record):
    with pytest.raises(BadRow) as bad:
        decode(record, COLUMNS)
    assert bad.value.reason == "damaged-record"


@pytest.mark.parametrize(
    ("row", "reason"), [({"a": "\ud800"}, "not-utf8"), ({"a": 2**70}, "wrong-type")], ids=["surrogate", "number"]
)
def test_a_row_that_no_record_can_hold_is_a_bad_row(row, reason):
    with pytest.raises(BadRow) as bad:
        encode("a:1", row)
    assert bad.value.reason == reason


def test_a_record_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 100)
    encode("a:1", {"a": b"x" * 50})
    with pytest.raises(BadRow, match="more than 100"):
        encode("a:1", {"a": b"x" * 100})


def test_shards_are_cut_by_size_and_groups_cut_shards(tmp_path):
    shards = write(tmp_path / "out", [talk(str(i)) for i in range(1000)], shard_bytes=40_000)
    assert len(shards) > 1
    assert sum(shard.records for shard in shards[:-1]) > 256
    rows = RecordRows(shards, COLUMNS)
    expected = [n for shard in shards for n in (*[256] * (shard.records // 256), shard.records % 256) if n]
    assert rows.group_rows.tolist() == expected
    read = [
        (rows.name(group, row), rows.row(group, row))
        for group, count in enumerate(rows.group_rows)
        for row in range(count)
    ]
    assert [row for _, row in read] == [talk(str(i)) for i in range(1000)]
    names = [f"{shard.path.name}:{i}" for shard in shards for i in range(shard.records)]
    assert [name for name, _ in read] == names


def test_the_same_records_make_the_same_bytes(tmp_path):
    rows = [talk(str(i)) for i in range(300)]
    first, again = write(tmp_path / "a", rows), write(tmp_path / "b", rows)
    assert [shard.told() for shard in first] == [shard.told() for shard in again]
    assert manifest.sha256_of(first[0].path) == first[0].sha256


def test_threads_read_the_same_rows_from_more_shards_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_OPEN_SHARDS", 2)
    rows = RecordRows(write(tmp_path / "out", [talk(str(i)) for i in range(600)], shard_bytes=5000), COLUMNS)
    assert len(rows.group_rows) > 5
    wrong = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for group in rng.integers(len(rows.group_rows), size=300):
            row = int(rng.integers(rows.group_rows[group]))
            number = rows.group_rows[:group].sum() + row
            if rows.row(group, row) != talk(str(number)):
                wrong.append((group, row))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_training_reads_folders_and_shards_of_them(tmp_path):
    shards = write(tmp_path / "out", [talk(str(i)) for i in range(40)], shard_bytes=1000)
    whole = list(read_documents(SourceConfig("mine", "text", (str(tmp_path / "out"),))))
    assert [document.parts[-2].text for document in whole] == [f" {i}" for i in range(40)]
    by_glob = SourceConfig("mine", "text", (str(tmp_path / "out" / "*.array_record"),))
    assert list(read_documents(by_glob)) == whole
    one = list(read_documents(SourceConfig("mine", "text", (str(shards[1].path),))))
    assert one == whole[shards[0].records : shards[0].records + shards[1].records]
    source = open_source(tmp_path / "out")
    assert sorted(source.read(0, i)[0].id for i in range(40)) == sorted(document.id for document in whole)


def test_a_damaged_record_is_a_bad_row_and_its_neighbours_are_not(tmp_path):
    (shard,) = write(tmp_path / "out", [talk(str(i) * 50) for i in range(10)])
    data = bytearray(shard.path.read_bytes())
    data[data.index(b"5" * 50)] ^= 1
    shard.path.write_bytes(data)
    source = open_source(shard.path.parent)
    read = [source.read(0, i)[0] for i in range(10)]
    (bad,) = [element for element in read if isinstance(element, Rejected)]
    assert (bad.name, bad.reason) == ("mine/00000-00000.array_record:5", "damaged-record")
    assert str(shard.path) in bad.message


def test_a_record_that_is_no_msgpack_is_a_bad_row(tmp_path):
    write(tmp_path / "out", [talk("4"), b"\xc1", talk("5")])
    source = open_source(tmp_path / "out")
    assert sorted(getattr(source.read(0, i)[0], "reason", "") for i in range(3)) == ["", "", "damaged-record"]


def test_what_is_not_prepared_is_refused_with_the_mend(tmp_path):
    (shard,) = write(tmp_path / "out", [talk("4")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "a b.tar").write_bytes(b"")
    stray = shard.path.with_name("stray.array_record")
    stray.write_bytes(b"")
    for paths, message in [
        ((tmp_path / "empty",), "holds no manifest.json"),
        ((stray,), "is not among the shards"),
        ((tmp_path / "out", tmp_path / "a b.tar"), "mixes .*prepared shards"),
        ((tmp_path / "a b.tar",), r"data_pipelines.prepare --kind text --input '.*a b.tar' --output FOLDER"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(*paths)
    with pytest.raises(UserError, match="set kind to 'text'"):
        open_source(tmp_path / "out", kind="obelics")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"format": 1', '"format": 9', "format 9"),
        ('"records": 1', '"records": 2', "digests do not make up its own"),
        ('"shards"', '"shard"', "cannot be read"),
        ("{", "[", "cannot be read"),
        ("00000-00000", "../../00000-00000", "is missing"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, before, after, message):
    write(tmp_path / "out", [talk("4")])
    path = tmp_path / "out" / manifest.MANIFEST
    path.write_text(path.read_text().replace(before, after, 1))
    if message == "is missing":  # a name is never a path: the shard is looked for in the folder alone
        open_source(tmp_path / "out")
        return
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "out")


def test_no_two_rows_have_one_name_where_shards_of_two_folders_have(tmp_path):
    """Decoded images are kept by it."""
    shards = [shard for folder in ("a", "b") for shard in write(tmp_path / folder, [talk("4"), talk("5")])]
    rows = RecordRows(shards, COLUMNS)
    names = {rows.name(group, row) for group, count in enumerate(rows.group_rows) for row in range(count)}
    assert names == {f"{folder}/00000-00000.array_record:{row}" for folder in "ab" for row in (0, 1)}
