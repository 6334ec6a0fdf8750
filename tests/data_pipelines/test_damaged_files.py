"""Files that cannot be read at all: their documents are left out and counted, up to the limit."""

import dataclasses
import logging
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import messages
from data_pipelines.pipeline import DataConfig, Stage, batches
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from idefics_jax.errors import UserError
from tests.data_pipelines.test_pipeline import assert_same, take
from tests.data_pipelines.test_records import talk, write

DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "emptied": lambda path: path.write_bytes(b""),
    "lost": lambda path: path.unlink(),
    "without its index": lambda path: path.write_bytes(path.read_bytes()[:-66_000] + bytes(66_000)),
}


def start(config: DataConfig, processor):
    return batches(config, processor, process_index=0, process_count=1)


def one_epoch(config: DataConfig, processor) -> tuple[list, set[str]]:
    """Returns the batches up to the end of the first epoch, and the names in them."""
    iterator, taken = start(config, processor), []
    while not taken or taken[-1].epochs["mine"] < 1:
        taken.append(next(iterator))
    return taken, {name for packed in taken for name in packed.documents}


def reading(config: DataConfig, paths, *, limit: float) -> DataConfig:
    source = SourceConfig("mine", "text", tuple(map(str, paths)))
    return dataclasses.replace(
        config, stages=(Stage((source,)),), virtual_shards=1, max_bad_fraction=limit, lookahead=4
    )


@pytest.fixture
def shards(tmp_path):
    """Eight shards of records."""
    return write(tmp_path / "out", [talk(str(i)) for i in range(230)], shard_bytes=2600)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_left_out_and_counted_and_no_other_document_changes(
    damage, shards, config, processor, tmp_path, caplog
):
    config = reading(config, [tmp_path / "out"], limit=0.3)
    _, whole = one_epoch(config, processor)
    DAMAGE[damage](shards[1].path)
    with caplog.at_level(logging.WARNING, logger="absl"):
        taken, names = one_epoch(config, processor)
    lost = f"mine/{shards[1].path.name}:"
    assert names >= {name for name in whole if not name.startswith(lost)}
    assert not [name for name in names if name.startswith(lost)]
    assert taken[-1].rejected["damaged-file"] >= shards[1].records
    assert taken[-1].examples["damaged-file"].startswith(lost)
    share = shards[1].records / 230
    assert f"1 of {len(shards)} files cannot be read, about {share:.2%} of the documents" in caplog.text
    assert str(shards[1].path) in caplog.text
    assert "prepare it again" in caplog.text


@pytest.mark.parametrize("damage", DAMAGE)
def test_too_many_damaged_shards_stop_the_run_before_it_begins(damage, shards, config, processor, tmp_path):
    DAMAGE[damage](shards[0].path)
    share = shards[0].records / 230
    with pytest.raises(UserError, match=r"data.max_bad_fraction = 0.01 allows less") as stopped:
        start(reading(config, [tmp_path / "out"], limit=0.01), processor)
    assert f"about {share:.2%}" in str(stopped.value)
    assert str(shards[0].path) in str(stopped.value)


def test_the_share_is_of_the_mixture(shards, config, processor, tmp_path):
    shards[0].path.unlink()
    write(tmp_path / "other", [talk("4")] * 9)
    config = reading(config, [tmp_path / "out"], limit=0.05)
    (lossy,) = config.stages[0].sources
    other = SourceConfig("other", "text", (str(tmp_path / "other"),), weight=9.0)
    next(start(dataclasses.replace(config, stages=(Stage((lossy, other)),)), processor))
    heavy = dataclasses.replace(lossy, weight=9.0)
    with pytest.raises(UserError, match="allows less"):
        start(dataclasses.replace(config, stages=(Stage((heavy, other)),)), processor)


def test_a_run_goes_on_when_a_shard_has_been_mended(shards, config, processor, tmp_path):
    config = reading(config, [tmp_path / "out"], limit=0.3)
    good = shards[1].path.read_bytes()
    expected = take(start(config, processor), 12)
    shards[1].path.write_bytes(b"")
    iterator = start(config, processor)
    take(iterator, 3)
    state = iterator.get_state()
    shards[1].path.write_bytes(good)
    mended = start(config, processor)
    mended.set_state(state)
    assert take(mended, 40)[-1].documents
    for found, wanted in zip(take(start(config, processor), 12), expected, strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("damage", ["cut", "emptied"])
def test_a_damaged_parquet_file_is_one_bad_row(damage, config, processor, tmp_path):
    paths = [tmp_path / f"{i}.parquet" for i in range(10)]
    for path in paths:
        pq.write_table(pa.Table.from_pylist([talk("4") for _ in range(20)], schema=messages.NEEDED[0]), path)
    DAMAGE[damage](paths[3])
    taken, names = one_epoch(reading(config, paths, limit=0.15), processor)
    assert names >= {f"mine/{path.name}:{row}" for path in paths if path != paths[3] for row in range(20)}
    assert taken[-1].examples == {"damaged-file": "mine/3.parquet:0"}
    with pytest.raises(UserError, match=r"1 of 10 files cannot be read, about 10.00% .*3.parquet.* allows less"):
        start(reading(config, paths, limit=0.05), processor)
    with pytest.raises(UserError, match=re.escape(f"{paths[3]} is not a readable parquet file")):
        start(reading(config, [paths[3]], limit=0.9), processor)


def test_evaluation_reads_no_set_with_a_damaged_shard(shards, tmp_path):
    shards[1].path.unlink()
    with pytest.raises(UserError, match=re.escape(f"{shards[1].path} is missing")):
        list(read_documents(SourceConfig("mine", "text", (str(tmp_path / "out"),))))
