import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import parquet
from data_pipelines.rejection import BadRow
from data_pipelines.row_groups import RowGroups
from idefics_jax.errors import UserError


@pytest.fixture
def rows(tmp_path) -> parquet.ParquetRows:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"n": range(25), "x": ["?"] * 25}), tmp_path / "a" / "same.parquet", row_group_size=10)
    pq.write_table(pa.table({"n": range(25, 30), "x": ["?"] * 5}), tmp_path / "b" / "same.parquet")
    footers = parquet.read_footers(parquet.expand([str(tmp_path / "*" / "*.parquet")], where="here"))
    return parquet.ParquetRows(footers, ["n"], kept=RowGroups(max_bytes=0))


def test_any_row_is_reached_at_random(rows):
    assert rows.group_rows.tolist() == [10, 10, 5, 5]
    starts = [0, 10, 20, 25]
    for group in (3, 0, 2, 1, 3):
        for row in (4, 0, 2):
            assert rows.row(group, row) == {"n": starts[group] + row}


def test_a_row_group_is_read_once_while_there_is_room_for_it(rows, monkeypatch):
    opened = []
    monkeypatch.setattr(
        parquet, "open_file", lambda path, open_file=parquet.open_file: (opened.append(path), open_file(path))[1]
    )
    for group in (0, 0, 1, 1, 0):
        rows.row(group, 3)
    assert len(opened) == 3


def test_names_tell_files_and_rows_apart(rows):
    names = [rows.name(group, row) for group, count in enumerate(rows.group_rows) for row in range(count)]
    assert names[12] == "a/same.parquet:12"
    assert names[26] == "b/same.parquet:1"
    assert len(set(names)) == 30


@pytest.mark.parametrize(
    ("found", "wanted", "fits"),
    [
        (pa.large_list(pa.large_string()), pa.list_(pa.string()), True),
        (pa.list_(pa.null()), pa.list_(pa.string()), True),
        (pa.list_(pa.binary()), pa.list_(pa.string()), False),
        (pa.string(), pa.list_(pa.string()), False),
        (pa.large_binary(), pa.binary(), True),
        (pa.int64(), pa.string(), False),
        (pa.struct([("a", pa.string()), ("b", pa.int32())]), pa.struct([("a", pa.string())]), True),
        (pa.struct([("b", pa.int32())]), pa.struct([("a", pa.string())]), False),
    ],
)
def test_types_that_hold_the_same_values_are_accepted(found, wanted, fits):
    assert parquet.reads_as(found, wanted) is fits


def test_files_that_cannot_be_read_are_named(tmp_path):
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"n": range(1000)}), whole)
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-20])
    (tmp_path / "empty.parquet").write_bytes(b"")
    for name in ("cut", "empty"):
        with pytest.raises(UserError, match=f"{name}.parquet is not a readable parquet file"):
            parquet.read_footers([str(tmp_path / f"{name}.parquet")])
    with pytest.raises(UserError, match=r"here names .*gone.*, which matches no file"):
        parquet.expand([str(tmp_path / "gone*.parquet")], where="here")
    with pytest.raises(UserError, match=r"names .*whole.parquet' 2 times"):
        parquet.expand([str(whole), str(tmp_path / "who*.parquet")], where="here")
    with pytest.raises(UserError, match=r"names .*whole.parquet' 2 times"):
        parquet.expand([str(whole), f"{tmp_path}/../{tmp_path.name}/whole.parquet"], where="here")


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path):
    for name in ("a[1].parquet", "a1.parquet"):
        (tmp_path / name).write_text("")
    assert parquet.expand([str(tmp_path / "a[1].parquet")], where="here") == [str(tmp_path / "a[1].parquet")]
    assert parquet.expand([str(tmp_path / "a[0-9].parquet")], where="here") == [str(tmp_path / "a1.parquet")]


def test_a_footer_s_digest_tells_of_other_values(tmp_path):
    digests = []
    for name, values in [("a", ["one", "two"]), ("same", ["one", "two"]), ("other", ["one", "too"])]:
        pq.write_table(pa.table({"text": values}), tmp_path / name)
        digests.append(parquet.read_footers([str(tmp_path / name)])[0].digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_row_group_that_takes_far_more_memory_than_its_file_is_given_up(tmp_path, monkeypatch):
    """A text of a megabyte, the same in 3,000 rows: 459 bytes that took 4.7 GiB."""
    monkeypatch.setattr(parquet, "MOST_BYTES", 10_000_000)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["a" * 100_000]))
    pq.write_table(pa.table({"text": text}), tmp_path / "bomb.parquet", store_schema=False, compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 20_000
    rows = parquet.ParquetRows(
        parquet.read_footers([str(tmp_path / "bomb.parquet")]), ["text"], kept=RowGroups(max_bytes=0)
    )
    with pytest.raises(BadRow, match=r"row group 0 of .*bomb.parquet takes more than 10000000 bytes") as refused:
        rows.row(0, 7)
    assert refused.value.reason == "too-large-row-group"
    (tmp_path / "bomb.parquet").unlink()  # it is not read again
    with pytest.raises(BadRow, match="prepare the file"):
        rows.row(0, 8)
