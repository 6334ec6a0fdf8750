"""The stream of batches does not depend on how many processes hold its shards, nor on where it was interrupted."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from data_pipelines import cauldron, pairs, position
from data_pipelines.packed_rows import LEFT_BEHIND
from data_pipelines.pipeline import Stage, batches
from data_pipelines.sources import DocumentSource
from idefics_jax.errors import UserError
from tests.data_pipelines.pictures import png
from tests.data_pipelines.test_pipeline import pair, take

SHARDS, STEPS = 8, 12


@pytest.fixture
def sharded(config):
    shape = dataclasses.replace(config.shape, rows=SHARDS)
    return dataclasses.replace(config, shape=shape, virtual_shards=SHARDS, lookahead=6)


def start(config, processor, count):
    return [batches(config, processor, process_index=index, process_count=count) for index in range(count)]


def step(processes) -> tuple[dict, tuple[str, ...]]:
    """Returns the global batch: the rows of all processes, one process after another."""
    parts = [next(process) for process in processes]
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    return arrays, tuple(name for part in parts for name in part.documents)


def assert_same_stream(found, wanted) -> None:
    for (arrays, names), (expected, expected_names) in zip(found, wanted, strict=True):
        assert names == expected_names
        for name, array in expected.items():
            np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def merged(processes) -> dict:
    """Returns the position as a checkpoint holds it: the shards of all processes."""
    states = [json.loads(json.dumps(process.get_state())) for process in processes]
    return {"about": states[0]["about"], "shards": {k: v for state in states for k, v in state["shards"].items()}}


def test_any_number_of_processes_gives_the_same_batches(sharded, processor):
    wanted = [step(start_) for start_ in [start(sharded, processor, 1)] for _ in range(STEPS)]
    for count in (2, 4, 8):
        processes = start(sharded, processor, count)
        assert_same_stream([step(processes) for _ in range(STEPS)], wanted)


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(4, 1), (4, 2), (4, 8), (1, 4), (8, 2)])
def test_a_run_goes_on_with_another_number_of_processes(sharded, processor, saved_on, resumed_on):
    processes = start(sharded, processor, saved_on)
    for _ in range(3):
        step(processes)
    state = merged(processes)
    wanted = [step(processes) for _ in range(4)]
    resumed = start(sharded, processor, resumed_on)
    for process in resumed:
        process.set_state(state)
    assert_same_stream([step(resumed) for _ in range(4)], wanted)


def test_every_document_comes_once_in_each_epoch(one_source, processor):
    """With no choice among waiting documents, what has been packed is what has been read."""
    rows = [pair(str(i)) for i in range(83)]
    config = one_source(rows, "pairs", pairs.SCHEMA, virtual_shards=4, lookahead=1, rounds=0)
    iterator = batches(config, processor, process_index=0, process_count=1)
    seen = collections.Counter()
    epochs = 0
    while epochs < 3:
        (packed,) = take(iterator, 1)
        seen.update(packed.documents)
        epochs = packed.epochs["mine"]
    # Each shard has read between two and three times its share and a row more, so every document twice at least.
    assert len(seen) == 83
    assert set(seen.values()) <= {2, 3, 4}
    assert packed.seen == pytest.approx(83 * packed.epochs["mine"])


def test_no_document_is_lost_or_doubled_while_others_wait(one_source, processor):
    """Packed or waiting: together they are every document of the epoch, once."""
    rows = [pair("word " * (1 + i % 9)) for i in range(400)]
    config = one_source(rows, "pairs", pairs.SCHEMA, virtual_shards=2, lookahead=40, rounds=8)
    iterator = batches(config, processor, process_index=0, process_count=1)
    packed, read = collections.Counter(), 0
    while read < 300:
        batch = next(iterator)
        packed.update(batch.documents)
        read = batch.seen
    shards = iterator.get_state()["shards"].values()
    waiting = sum(len(json.loads(shard["packed"]["pool"])) for shard in shards)
    assert set(packed.values()) == {1}
    assert len(packed) + waiting == read


def test_memory_of_waiting_documents_is_bounded(one_source, processor):
    rows = [pair("x" * 4) for _ in range(300)]
    few = one_source(rows, "pairs", pairs.SCHEMA, virtual_shards=1, lookahead=10_000, lookahead_mib=1)
    iterator = batches(few, processor, process_index=0, process_count=1)
    next(iterator)
    (shard,) = iterator.get_state()["shards"].values()
    assert 300 < len(json.loads(shard["packed"]["pool"])) < 600  # of about 2 kB each


@pytest.fixture
def ended(one_source, processor, tmp_path):
    """A run in two shards that ended with many documents waiting: its config, and the documents it had packed."""
    rows = [pair("word " * (1 + i % 9)) for i in range(400)]
    config = one_source(rows, "pairs", pairs.SCHEMA, virtual_shards=2, lookahead=40, rounds=8)
    data = batches(config, processor, process_index=0, process_count=1)
    packed = [name for batch in take(data, 6) for name in batch.documents]
    assert sum(len(json.loads(shard["packed"]["waiting"])) for shard in data.get_state()["shards"].values()) > 40
    write_position(data, tmp_path / "run")
    return config, packed


def write_position(data, workdir):
    (workdir / position.FOLDER).mkdir(parents=True, exist_ok=True)
    position.write(epath.Path(workdir / position.FOLDER), data, first_process=True)


def test_another_run_trains_the_rest_of_the_epoch_once(ended, processor, tmp_path):
    config, packed = ended
    later = dataclasses.replace(config, after=str(tmp_path / "run"), rounds=2, lookahead=1)
    data, counts = batches(later, processor, process_index=0, process_count=1), collections.Counter(packed)
    while len(counts) < 400:
        counts.update(next(data).documents)
    # Each shard may be ahead of the other by what is in a batch or two.
    assert sum(count > 1 for count in counts.values()) < 40
    assert max(counts.values()) <= 2


def test_a_third_run_goes_on_where_the_second_left_what_it_did_not_read(ended, processor, tmp_path):
    """Documents that waited in the first and were not reached in the second, and a source that the second has not."""
    config, packed = ended
    ((source,),) = (stage.sources for stage in config.stages)
    other = (Stage((dataclasses.replace(source, name="other"),)),)
    for number, changes in enumerate([{"lookahead": 1}, {"stages": other}]):
        between = dataclasses.replace(config, after=str(tmp_path / "run"), **changes)
        data = batches(between, processor, process_index=0, process_count=1)
        names = [name for name in next(data).documents if name.startswith("mine/")]
        write_position(data, tmp_path / str(number))
        last = dataclasses.replace(config, after=str(tmp_path / str(number)), lookahead=1)
        data, counts = batches(last, processor, process_index=0, process_count=1), collections.Counter(packed + names)
        while len(counts) < 400:
            counts.update(next(data).documents)
        assert sum(count > 1 for count in counts.values()) < 40
        with pytest.raises(UserError, match="source 'mine' had other files or another order"):
            batches(dataclasses.replace(last, seed=5), processor, process_index=0, process_count=1)


def test_a_row_of_many_waiting_pieces_is_read_once_when_restored(one_source, processor, monkeypatch):
    turns = [{"user": f"what is {i}", "assistant": "five", "source": ""} for i in range(40)]
    rows = [{"images": [{"bytes": png(28, 28), "path": None}], "texts": turns}] * 4
    config = one_source(rows, "cauldron", cauldron.SCHEMA, lookahead=4)
    data = batches(config, processor, process_index=0, process_count=1)
    next(data)
    state, read = data.get_state(), []
    waiting = json.loads(state["shards"]["0"]["packed"]["pool"])
    monkeypatch.setattr(
        DocumentSource, "read", lambda *where, read_=DocumentSource.read: read.append(where) or read_(*where)
    )
    fresh = batches(config, processor, process_index=0, process_count=1)
    fresh.set_state(state)
    assert len(read) == len({index for index, _ in waiting}) < len(waiting)


def test_pieces_of_a_row_that_was_begun_do_not_come_again_and_are_counted(one_source, processor, tmp_path):
    turns = [{"user": f"what is {i}", "assistant": "five", "source": ""} for i in range(12)]
    rows = [{"images": [{"bytes": png(28, 28), "path": None}], "texts": turns[: 1 + i % 12]} for i in range(40)]
    config = one_source(rows, "cauldron", cauldron.SCHEMA, lookahead=20)
    data = batches(config, processor, process_index=0, process_count=1)
    first = [name for batch in take(data, 3) for name in batch.documents]
    (shard,) = data.get_state()["shards"].values()
    begun, left = json.loads(shard["packed"]["begun"]), json.loads(shard["packed"]["left"])
    assert len(left) == sum(index in begun for index, _ in json.loads(shard["packed"]["pool"])) > 0
    write_position(data, tmp_path / "run")
    later = batches(
        dataclasses.replace(config, after=str(tmp_path / "run")), processor, process_index=0, process_count=1
    )
    (*_, last) = packed = take(later, 3)
    assert last.rejected == {LEFT_BEHIND: len(left)}
    assert last.examples == {LEFT_BEHIND: left[0]}
    second = [name for batch in packed for name in batch.documents]
    (after,) = later.get_state()["shards"].values()
    assert last.seen == len(second) + len(left) + len(json.loads(after["packed"]["pool"]))
    assert any("[" in name for name in first + second)
    assert not set(first) & set(second)
    assert not {name.split("[")[0] for name in first} & {name.split("[")[0] for name in second}


def test_a_run_does_not_go_on_in_another_order_or_other_files(ended, one_source, processor, tmp_path):
    later = dataclasses.replace(ended[0], after=str(tmp_path / "run"))
    ((source,),) = (stage.sources for stage in later.stages)
    windowed = (Stage((dataclasses.replace(source, window=1),)),)
    for config, message in [
        (dataclasses.replace(later, after=str(tmp_path)), "which holds no data_position"),
        (dataclasses.replace(later, virtual_shards=1), "a run of 2 virtual shards; this one has 1"),
        (dataclasses.replace(later, seed=later.seed + 1), r"source 'mine' .* another order \(seed: \d+ -> \d+\)"),
        (dataclasses.replace(later, stages=windowed), r"window: \d+ -> 1"),
    ]:
        with pytest.raises(UserError, match=message):
            batches(config, processor, process_index=0, process_count=1)
    other = one_source([pair("x")] * 400, "pairs", pairs.SCHEMA, virtual_shards=2, after=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"source 'mine' had other files .*\(digest: "):
        batches(other, processor, process_index=0, process_count=1)


def test_a_run_does_not_go_on_from_files_that_another_version_wrote_or_that_are_damaged(ended, processor, tmp_path):
    later, folder = dataclasses.replace(ended[0], after=str(tmp_path / "run")), tmp_path / "run" / position.FOLDER
    about, shard = (json.loads((folder / name).read_text()) for name in ("about.json", "shard_1.json"))
    del about["earlier"], shard["packed"]["left"], shard["packed"]["waiting"]
    for name, text, message in [
        ("shard_1.json", json.dumps(shard), r"shard_1.json lacks packed.waiting, packed.left, so another version"),
        (
            "shard_1.json",
            '{"packed": ',
            r"shard_1.json cannot be read .*; put it back from a copy, or leave data.after",
        ),
        ("about.json", json.dumps(about), r"about.json lacks earlier, so another version .* leave data.after out"),
    ]:
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=message):
            batches(later, processor, process_index=0, process_count=1)


def test_a_position_is_refused_where_the_run_before_has_gone_on(ended, processor, tmp_path):
    config = dataclasses.replace(ended[0], after=str(tmp_path / "run"))
    later = batches(config, processor, process_index=0, process_count=1)
    state = later.get_state()
    position.keep(str(tmp_path / "run"), epath.Path(tmp_path / "kept"))
    write_position(later, tmp_path / "run")
    with pytest.raises(UserError, match="data.after: "):
        batches(config, processor, process_index=0, process_count=1).set_state(state)
    kept = dataclasses.replace(config, after=str(tmp_path / "kept"))
    batches(kept, processor, process_index=0, process_count=1).set_state(state)
