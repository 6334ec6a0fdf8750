"""Row groups in memory: as many bytes as there is room for, over all sources, and a word where that is too little."""

import dataclasses
import logging

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import messages, pairs
from data_pipelines.pipeline import Stage, batches
from data_pipelines.row_groups import RowGroups
from data_pipelines.source_config import SourceConfig
from tests.data_pipelines.pictures import png
from tests.data_pipelines.test_records import talk


def table(rows: int) -> pa.Table:
    return pa.table({"n": pa.array(range(rows), pa.int64())})


def test_what_was_used_last_stays_and_bytes_are_bounded():
    kept, loaded = RowGroups(max_bytes=100 * 8), []

    def use(key, rows=30):
        def load():
            loaded.append(key)
            return table(rows)

        assert kept.get(key, load).num_rows == rows

    for key in "abcab":
        use(key)
    assert loaded == ["a", "b", "c"]
    use("d")  # c was used longest ago
    for key in "abd":
        use(key)
    assert loaded == ["a", "b", "c", "d"]
    use("large", rows=1000)  # more than there is room for: it is there alone
    use("large", rows=1000)
    assert loaded[4:] == ["large"]
    use("a")
    assert loaded[5:] == ["a"]


def test_row_groups_that_leave_too_early_are_told_of_once(caplog):
    caplog.set_level(logging.WARNING, logger="absl")
    kept = RowGroups(max_bytes=0)
    for number in range(300):
        kept.get(number % 100, lambda: table(20))
    assert caplog.text.count("with 64 of their 1280 rows read, and are read again") == 1
    assert "prepare the data" in caplog.text
    caplog.clear()
    kept = RowGroups(max_bytes=0)
    for number in range(100):
        for _ in range(20):
            kept.get(number, lambda: table(20))
    assert not caplog.text


def test_all_sources_of_a_pipeline_share_the_room(config, processor, tmp_path, monkeypatch):
    held = []
    get = RowGroups.get
    monkeypatch.setattr(RowGroups, "get", lambda self, *of: (get(self, *of), held.append(self))[0])
    rows = {
        "text": ([talk("4" * 9) for _ in range(200)], messages.SCHEMA),
        "pairs": ([{"png": png(28, 28), "caption": "c"} for _ in range(200)], pairs.SCHEMA),
    }
    sources = []
    for kind, (of_kind, schema) in rows.items():
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.Table.from_pylist(of_kind, schema=schema), path, row_group_size=10)
        sources.append(SourceConfig(kind, kind, (str(path),)))
    config = dataclasses.replace(config, stages=(Stage(tuple(sources)),), row_groups_mib=1)
    next(batches(config, processor, process_index=0, process_count=1))
    assert len({id(one) for one in held}) == 1
    assert held[0]._bytes <= 2**20
