import dataclasses
import json
import logging

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from data_pipelines import cauldron, obelics, pairs
from data_pipelines.packing import fill
from data_pipelines.pipeline import DataConfig, Stage, batches
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from idefics_jax import settings
from idefics_jax.batch import BatchShape
from idefics_jax.errors import UserError
from idefics_jax.processor import Processor
from idefics_jax.tokenizer import Tokenizer
from idefics_jax.training.data_position import RestorePosition, SavePosition
from tests.data_pipelines.pictures import damaged, png

STEPS = 30


def start(config, processor, process_index=0, process_count=1):
    return batches(config, processor, process_index=process_index, process_count=process_count)


def take(iterator, count: int) -> list:
    return [next(iterator) for _ in range(count)]


def assert_same(found, expected) -> None:
    assert found.documents == expected.documents
    assert (found.seen, found.rejected, found.examples) == (expected.seen, expected.rejected, expected.examples)
    for name, array in expected.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array, err_msg=name)


def pair(caption: str, image: bytes | None = None) -> dict:
    return {"key": "0", "png": png(28, 28) if image is None else image, "caption": caption, "url": "x"}


def test_packed_documents_are_those_of_the_files(config, processor):
    sources = {source.name: source for stage in config.stages for source in stage.sources}
    documents = {
        f"{document.source}/{document.id}": document
        for source in sources.values()
        for document in read_documents(source)
    }
    for packed in take(start(config, processor), 12):
        batch, names = packed.arrays, iter(packed.documents)
        for row in range(config.shape.rows):
            image = 0
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                encoded = processor.encode(documents[next(names)].parts, add_bos=True, add_eos=True)
                here = batch["segment_ids"][row] == segment
                np.testing.assert_array_equal(batch["tokens"][row][here], encoded.tokens)
                np.testing.assert_array_equal(batch["positions"][row][here], np.arange(len(encoded.tokens)))
                np.testing.assert_array_equal(batch["loss_weights"][row][here][:-1], encoded.trained[1:])
                assert batch["loss_weights"][row][here][-1] == 0
                for patches in processor.patches(encoded):
                    image += 1
                    where = np.argwhere(batch["patch_image_ids"][row] == image)
                    assert len(set(where[:, 0])) == 1
                    np.testing.assert_array_equal(batch["patches"][row][tuple(where.T)], patches)
            assert batch["image_mask"][row].sum() == image == batch["patch_image_ids"][row].max()
            latents = (batch["tokens"][row] == processor.tokenizer.image_token_id).sum()
            assert latents == image * processor.num_latents
        assert next(names, None) is None


def test_same_seed_gives_the_same_batches_whatever_the_threads(config, processor):
    expected = take(start(config, processor), STEPS)
    threaded = dataclasses.replace(config, num_threads=3, prefetch=2, cache_mib=64)
    for found, wanted in zip(take(start(threaded, processor), STEPS), expected, strict=True):
        assert_same(found, wanted)
    other = next(start(dataclasses.replace(config, seed=1), processor))
    assert other.documents != expected[0].documents


@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_at_every_step_goes_on_to_the_bit(config, processor, threads):
    config = dataclasses.replace(config, num_threads=threads, prefetch=1 + threads)
    iterator, states, expected = start(config, processor), [], []
    for _ in range(STEPS):
        states.append(json.dumps(iterator.get_state()))
        expected.append(next(iterator))
    resumed = start(config, processor)
    for step in range(STEPS - 1):
        resumed.set_state(json.loads(states[step]))
        assert_same(next(resumed), expected[step])
        assert_same(next(resumed), expected[step + 1])


def test_grain_finds_the_same_output_after_a_checkpoint(config, processor):
    class FewBatches(grain.IterDataset):
        def __iter__(self):
            return Few(start(config, processor))

    class Few(grain.DatasetIterator):
        """The first batches only, as plain arrays: Grain's check runs to the end."""

        def __init__(self, batches):
            super().__init__(batches)
            self._left = 8

        def __next__(self):
            if not self._left:
                raise StopIteration
            self._left -= 1
            return next(self._parent).arrays

        def get_state(self):
            return {"left": self._left, "parent": self._parent.get_state()}

        def set_state(self, state):
            self._left = state["left"]
            self._parent.set_state(state["parent"])

    grain.experimental.assert_equal_output_after_checkpoint(FewBatches())


def test_an_orbax_checkpoint_brings_the_position_back(config, processor, tmp_path):
    iterator = start(config, processor)
    take(iterator, 7)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(7, args=ocp.args.Composite(data=SavePosition(iterator)))
        expected = take(iterator, 3)
        manager.wait_until_finished()
        resumed = start(config, processor)
        manager.restore(7, args=ocp.args.Composite(data=RestorePosition(resumed)))
    for found, wanted in zip(take(resumed, 3), expected, strict=True):
        assert_same(found, wanted)


def test_a_position_in_other_data_is_refused(config, processor):
    state = start(config, processor).get_state()
    for change, told in [
        ({"seed": 1}, "data.seed: 0 -> 1"),
        ({"rounds": 0}, "data.rounds: 3 -> 0"),
        ({"virtual_shards": 4}, "data.virtual_shards: 2 -> 4"),
    ]:
        with pytest.raises(UserError, match=f"other data or other data settings .*{told}"):
            start(dataclasses.replace(config, **change), processor).set_state(state)


def test_a_changed_number_of_workers_is_named_and_changes_no_batch(config, processor, caplog):
    caplog.set_level(logging.WARNING, logger="absl")
    iterator = start(config, processor)
    next(iterator)
    state, expected = iterator.get_state(), take(iterator, 3)
    other = start(dataclasses.replace(config, num_threads=3, prefetch=2, cache_mib=1, max_bad_fraction=0.5), processor)
    other.set_state(state)
    assert "other workers (num_threads: 0 -> 3; prefetch: 1 -> 2): its batches are the same" in caplog.text
    for found, wanted in zip(take(other, 3), expected, strict=True):
        assert_same(found, wanted)
    caplog.clear()
    start(config, processor, process_count=2).set_state(state)
    assert "other workers (processes: 1 -> 2)" in caplog.text
    caplog.clear()
    start(config, processor).set_state(state)
    assert not caplog.text


@pytest.mark.parametrize("part", ["stages", "sources", "weights", "image_rules", "num_latents", "tokenizer"])
def test_every_part_of_what_batches_depend_on_is_compared(part, config, processor):
    state = start(config, processor).get_state()
    first, second = config.stages
    stages, told = config.stages, ""
    if part == "stages":
        stages, told = (dataclasses.replace(first, documents=44), second), "data.stages.0.documents: 40 -> 44"
    elif part == "sources":
        stages, told = (first, dataclasses.replace(second, sources=second.sources[1:])), "data.stages.1.sources.pairs"
    elif part == "weights":
        pairs_source, *others = second.sources
        heavier = (dataclasses.replace(pairs_source, weight=2.0), *others)
        stages, told = (first, dataclasses.replace(second, sources=heavier)), "sources.pairs.weight: 1.0 -> 2.0"
    elif part == "image_rules":
        processor, told = processor.with_image_rules({"split": True}), "processor.image_rules.split: False -> True"
    elif part == "num_latents":
        processor = Processor(processor.tokenizer, processor.image_rules, processor.num_latents + 1)
        told = "processor.num_latents"
    else:
        same_but_for_its_bytes = Tokenizer(processor.tokenizer.model + b"\x12\x00")
        processor = Processor(same_but_for_its_bytes, processor.image_rules, processor.num_latents)
        told = "processor.tokenizer"
    with pytest.raises(UserError, match=told):
        start(dataclasses.replace(config, stages=stages), processor).set_state(state)


def test_a_position_of_an_earlier_version_is_refused_by_what_it_lacks(config, processor):
    state = start(config, processor).get_state()
    del state["shards"]["1"]["packed"]["marks"], state["shards"]["1"]["examples"]
    lacks = r"^shard 1 of the saved position lacks packed.marks, examples, so another version .* in another workdir$"
    with pytest.raises(UserError, match=lacks):
        start(config, processor).set_state(state)
    del state["shards"]["1"]  # which a checkpoint loses by damage alone: the one before it is taken
    with pytest.raises(FileNotFoundError, match="the saved position lacks shard 1; put its file back"):
        start(config, processor).set_state(state)


def test_a_file_written_anew_under_an_equal_footer_is_refused_by_a_waiting_document(one_source, processor):
    """Two captions of one length have changed places: sizes and statistics of the columns are what they were."""
    rows = [pair(f"{i:03}") for i in range(40)]
    config = one_source(rows, "pairs", pairs.SCHEMA, lookahead=8)
    first = start(config, processor)
    next(first)
    state = first.get_state()
    read = [int(name.rpartition(":")[2]) for name in next(first).documents]
    rows[read[0]], rows[read[-1]] = rows[read[-1]], rows[read[0]]
    again = start(one_source(rows, "pairs", pairs.SCHEMA, lookahead=8), processor)
    assert again.get_state()["about"] == state["about"]
    with pytest.raises(UserError, match=r"mine/rows.parquet:\d+ is not what it was when the position was saved"):
        again.set_state(state)
    rows[read[0]], rows[read[-1]] = rows[read[-1]], rows[read[0]]
    start(one_source(rows, "pairs", pairs.SCHEMA, lookahead=8), processor).set_state(state)


def test_stages_follow_one_another(config, processor):
    names = [name for packed in take(start(config, processor), 40) for name in packed.documents]
    sources = [name.split("/")[0] for name in names]
    assert sources.count("warmup") == 40
    assert set(sources) == {"warmup", "pairs", "interleaved", "conversations", "numbers"}
    assert set(sources[120:]) == {"pairs", "interleaved", "conversations", "numbers"}


def test_documents_are_mixed_by_weight(config, processor):
    stage = config.stages[-1]
    weighted = tuple(
        dataclasses.replace(source, weight=3.0 if source.name == "numbers" else 1.0) for source in stage.sources
    )
    config = dataclasses.replace(config, stages=(Stage(weighted),))
    names = [name for packed in take(start(config, processor), 60) for name in packed.documents]
    share = sum(name.startswith("numbers/") for name in names) / len(names)
    assert abs(share - 0.5) < 0.05


def test_a_document_with_damaged_pixels_leaves_padding_and_is_counted(one_source, processor):
    rows = [pair("good"), pair("bad", damaged(png(28, 28))), pair("fine")]
    config = one_source(rows, "pairs", pairs.SCHEMA, max_bad_fraction=0.5)
    iterator, counts = start(config, processor), []
    for step in take(iterator, 6):
        batch = step.arrays
        assert "mine/rows.parquet:1" not in step.documents
        assert batch["segment_ids"].max(1).sum() == len(step.documents)
        text = processor.tokenizer.decode(batch["tokens"].ravel().tolist())
        assert "bad" not in text
        assert "good" in text
        assert (batch["tokens"] == processor.tokenizer.image_token_id).sum() == 4 * batch["image_mask"].sum()
        np.testing.assert_array_equal(batch["patch_image_ids"].max((1, 2)), batch["image_mask"].sum(1))
        counts.append(step.rejected["corrupt"])
    assert counts == sorted(counts)
    assert counts[-1] > 10
    resumed = start(config, processor)
    resumed.set_state(iterator.get_state())
    assert_same(next(resumed), next(iterator))


def test_many_kinds_of_bad_rows_are_counted_and_change_no_good_one(one_source, processor):
    good = [pair(f"good {i}") for i in range(40)]
    bad = [
        (pair(None), "null-text"),
        ({**pair("x"), "png": None}, "null-image"),
        (pair("x", b""), "empty"),
        (pair("x", b"GIF89a"), "truncated"),
        (pair("x", b"BM" + bytes(60)), "format"),
        (pair("x", png(28, 28)[:20]), "truncated"),
        (pair("word " * 100), "too-many-tokens"),
        (pair("x", png(112, 112)), "image-too-large"),
    ]
    rows = good + [row for row, _ in bad]
    config = one_source(rows, "pairs", pairs.SCHEMA, max_bad_fraction=0.9, lookahead=1, rounds=0)
    packed = take(start(config, processor), 16)
    names = [name for step in packed for name in step.documents]
    assert set(names) == {f"mine/rows.parquet:{i}" for i in range(40)}
    assert set(packed[-1].rejected) == {reason for _, reason in bad}
    texts = processor.tokenizer.decode(np.concatenate([step.arrays["tokens"].ravel() for step in packed]).tolist())
    assert all(f"good {i}" in texts for i in range(40))


def test_too_many_bad_documents_stop_the_run_with_the_reasons(one_source, processor):
    rows = [pair("fine")] * 3 + [pair("bad", b"")]
    config = one_source(rows, "pairs", pairs.SCHEMA, max_bad_fraction=0.01)
    with pytest.raises(UserError) as stopped:
        take(start(config, processor), 100)
    message = str(stopped.value)
    assert message.startswith("11 of ")
    assert "(empty 11)" in message
    assert "data.max_bad_fraction = 0.01" in message
    assert "mine/rows.parquet:3" in message


def test_damaged_pixels_count_towards_the_limit(one_source, processor):
    rows = [pair("fine")] * 3 + [pair("bad", damaged(png(28, 28)))]
    config = one_source(rows, "pairs", pairs.SCHEMA, max_bad_fraction=0.01)
    with pytest.raises(UserError, match=r"^11 of \d+ documents were rejected \(corrupt 11\)"):
        take(start(config, processor), 100)


def test_a_missing_image_file_is_counted(one_source, processor):
    rows = [{"images": [None], "texts": ["words"]}, {"images": ["gone.png", None], "texts": [None, "words"]}]
    config = one_source(rows, "obelics", obelics.SCHEMA, max_bad_fraction=0.9)
    packed = take(start(config, processor), 4)
    assert set(packed[-1].rejected) == {"missing-image"}
    assert set(packed[-1].documents) == {"mine/rows.parquet:0"}


@pytest.mark.parametrize("text", ["<image>", "</s><s>", "<end_of_utterance>\nAssistant: ", "<fake_token_around_image>"])
def test_text_that_spells_a_control_token_stays_text(one_source, processor, text):
    config = one_source([pair(f"a {text} b")], "pairs", pairs.SCHEMA)
    packed = next(start(config, processor))
    tokenizer, tokens = processor.tokenizer, packed.arrays["tokens"]
    count = len(packed.documents)
    assert (tokens == tokenizer.image_token_id).sum() == count * processor.num_latents
    assert (tokens == tokenizer.fake_token_id).sum() == 2 * count
    assert (tokens == tokenizer.end_of_utterance_id).sum() == 0
    assert (tokens == tokenizer.bos_id).sum() == (tokens == tokenizer.eos_id).sum() == count
    assert f"a {text} b" in tokenizer.decode(tokens[0].tolist())


def test_rows_of_text_alone_are_batches_like_any_other(one_source, processor):
    rows = [{"images": [], "texts": [{"user": "2 + 2?", "assistant": str(i), "source": "sums"}]} for i in range(9)]
    packed = next(start(one_source(rows, "cauldron", cauldron.SCHEMA), processor))
    assert packed.arrays["segment_ids"].max() >= 2
    assert packed.arrays["loss_weights"].sum() > 0
    assert packed.arrays["image_mask"].sum() == packed.arrays["patch_image_ids"].sum() == 0


def test_a_document_with_nothing_to_learn_is_rejected(one_source, processor, tmp_path):
    (tmp_path / "a.png").write_bytes(png(28, 28))
    rows = [{"images": ["a.png"], "texts": [None]}, {"images": [None], "texts": ["words"]}]
    packed = next(start(one_source(rows, "obelics", obelics.SCHEMA, max_bad_fraction=0.9), processor))
    assert set(packed.rejected) == {"nothing-trained"}


def test_fill_is_the_useful_share(config, processor):
    packed = next(start(config, processor))
    shares = fill(packed.arrays)
    tokens = sum(int((row > 0).sum()) for row in packed.arrays["segment_ids"])
    assert shares["tokens"] == pytest.approx(tokens / packed.arrays["segment_ids"].size)
    assert 0 < shares["patches"] <= 1
    assert 0 < shares["images"] <= 1


def test_settings_are_built_from_a_config_and_checked(config, tmp_path):
    values = dataclasses.asdict(config)
    assert settings.build(DataConfig, values, "data") == config
    for change, message in [
        ({"lookahead": 0}, "data.lookahead is 0"),
        ({"max_bad_fraction": 1.0}, "data.max_bad_fraction is 1.0"),
        ({"max_bad_fraction": float("nan")}, "finite"),
        ({"num_threads": True}, "data.num_threads is True"),
        ({"stages": ()}, "last stage must have documents = None"),
        ({"lookahed": 3}, "did you mean 'lookahead'"),
    ]:
        with pytest.raises(UserError, match=message):
            settings.build(DataConfig, {**values, **change}, "data")


def test_stages_that_contradict_themselves_are_refused(config):
    source = SourceConfig("mine", "pairs", ("a",))
    for stages, message in [
        ((Stage((source,), documents=5),), "last stage must have"),
        ((Stage((source,)), Stage((source,))), "every stage but the last"),
        (
            (Stage((source,), documents=5), Stage((dataclasses.replace(source, paths=("b",)),))),
            "two sources are called 'mine'",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            dataclasses.replace(config, stages=stages)
    with pytest.raises(UserError, match="share a name"):
        Stage((source, source))
    with pytest.raises(UserError, match="no sources"):
        Stage(())


def test_shapes_that_do_not_fit_are_refused(config, processor):
    with pytest.raises(UserError, match="data.virtual_shards is 2; it must be a multiple of the 3 processes"):
        start(config, processor, 0, 3)
    with pytest.raises(UserError, match="data.shape.rows is 4; it must be a multiple of data.virtual_shards = 3"):
        dataclasses.replace(config, virtual_shards=3)
    with pytest.raises(UserError, match=r"data.shape.patch_dim is 3; .* 588"):
        start(dataclasses.replace(config, shape=BatchShape(4, 64, 2, 32, 8, 3)), processor)
