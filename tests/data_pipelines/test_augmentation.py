"""What chance changes: by the share asked for, the same again on resuming, otherwise in another epoch."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines import cauldron, messages, pairs
from data_pipelines.augmentation import Augmentation
from data_pipelines.pipeline import DataConfig, Stage, batches
from data_pipelines.source_config import SourceConfig
from idefics_jax.documents import Document, Image, Text
from idefics_jax.errors import UserError
from tests.data_pipelines.pictures import png


def start(config, processor):
    return batches(config, processor, process_index=0, process_count=1)


def with_augmentation(config: DataConfig, **chances) -> DataConfig:
    (stage,) = config.stages
    source = dataclasses.replace(stage.sources[0], augmentation=Augmentation(**chances))
    return dataclasses.replace(config, stages=(Stage((source,)),))


def many(augmentation, count=2000):
    document = Document((Image(b"a"), Text("x"), Image(b"b")), "s", "0")
    made = [augmentation.of_document(document, np.random.default_rng((0, index))) for index in range(count)]
    return [[part for part in document.parts if isinstance(part, Image)] for document in made]


def test_splitting_is_decided_once_a_document_by_its_share():
    images = many(Augmentation(split_share=0.3))
    assert all(first.split == second.split for first, second in images)
    np.testing.assert_allclose(np.mean([first.split for first, _ in images]), 0.3, atol=0.03)


def test_upscaling_is_drawn_for_each_image_from_the_authors_triangle():
    factors = np.array([[image.upscale for image in both] for both in many(Augmentation(upscale=0.5, upscale_to=3.0))])
    enlarged = factors[factors > 1]
    np.testing.assert_allclose(len(enlarged) / factors.size, 0.5, atol=0.03)
    assert 1.5 <= enlarged.min() < 1.6
    assert 2.95 < enlarged.max() <= 3.0
    np.testing.assert_allclose(enlarged.mean(), (1.5 + 3.0 + 3.0) / 3, atol=0.03)
    assert np.any((factors[:, 0] > 1) != (factors[:, 1] > 1))


def test_nothing_is_changed_by_default():
    assert not Augmentation().is_random
    assert {(image.split, image.upscale) for both in many(Augmentation(), 5) for image in both} == {(None, 1.0)}


def rows(count):
    return [{"key": str(i), "png": png(28, 28), "caption": f"caption {i}", "url": "x"} for i in range(count)]


@pytest.mark.parametrize("threads", [0, 2])
def test_images_are_read_as_decided_and_resuming_decides_alike(one_source, processor, threads):
    config = with_augmentation(one_source(rows(6), "pairs", pairs.SCHEMA), split_share=0.5, upscale=0.5)
    config = dataclasses.replace(config, num_threads=threads, cache_mib=16, lookahead=8)
    iterator, states, packed = start(config, processor), [], []
    for _ in range(8):
        states.append(iterator.get_state())
        packed.append(next(iterator))
    # 28 pixels are 2 x 2 patches whole and split, as both rules bring a side up to 28; enlarged 3 x 3 or 4 x 4.
    counts = set()
    for batch in packed:
        for ids in batch.arrays["patch_image_ids"]:
            counts |= set(np.bincount(ids[ids > 0]).tolist()) - {0}
    assert counts >= {4, 9}
    for step in (0, 3, 6):
        resumed = start(dataclasses.replace(config, cache_mib=0, num_threads=0), processor)
        resumed.set_state(states[step])
        again = next(resumed)
        assert again.documents == packed[step].documents
        for name, array in packed[step].arrays.items():
            np.testing.assert_array_equal(again.arrays[name], array, err_msg=name)


def test_turns_come_in_another_order_in_another_epoch_and_none_is_lost(one_source, processor):
    texts = [{"user": f"what is {n}?", "assistant": f"{n}", "source": "s"} for n in range(4)]
    row = {"images": [], "texts": texts}
    shape = dataclasses.replace(one_source([row], "cauldron", cauldron.SCHEMA).shape, tokens=256)
    config = one_source([row], "cauldron", cauldron.SCHEMA, shape=shape, lookahead=2)
    packed = next(start(with_augmentation(config, shuffle_turns=True), processor))
    orders = set()
    for tokens, segments in zip(packed.arrays["tokens"], packed.arrays["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            text = processor.decode(tokens[segments == segment].tolist())
            orders.add(tuple(int(rest[0]) for rest in text.split("what is ")[1:]))
    assert len(orders) > 1
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3)}


QUESTIONS = [{"user": f"what is {n}?", "assistant": f"number {n}"} for n in range(10)]


def test_each_question_gets_a_suffix_and_each_answer_is_a_sentence():
    augmentation = Augmentation(suffixes=("\nBe brief.", "\nOne word."), sentences=True)
    turns = [turn for seed in range(100) for turn in augmentation.of_turns(QUESTIONS, np.random.default_rng(seed))]
    asked = [turn["user"].split("\n") for turn in turns]
    np.testing.assert_allclose(np.mean([suffix == "Be brief." for _, suffix in asked]), 0.5, atol=0.05)
    assert {suffix for _, suffix in asked} == {"Be brief.", "One word."}
    assert [question for question, _ in asked[:10]] == [turn["user"] for turn in QUESTIONS]
    assert [turn["assistant"] for turn in turns[:10]] == [f"Number {n}." for n in range(10)]


def test_turns_are_kept_up_to_a_number_after_shuffling():
    kept = [
        [turn["user"] for turn in Augmentation(max_turns=7, shuffle_turns=True).of_turns(QUESTIONS, rng)]
        for rng in map(np.random.default_rng, range(50))
    ]
    assert {len(set(users)) for users in kept} == {7}
    assert {user for users in kept for user in users} == {turn["user"] for turn in QUESTIONS}
    assert Augmentation(max_turns=7).of_turns(QUESTIONS, np.random.default_rng(0)) == QUESTIONS[:7]
    assert Augmentation(max_turns=7).of_turns(QUESTIONS[:3], np.random.default_rng(0)) == QUESTIONS[:3]


def test_line_breaks_come_before_their_share_of_the_questions():
    turns = [
        turn
        for seed in range(200)
        for turn in Augmentation(line_break=0.05).of_turns(QUESTIONS, np.random.default_rng(seed))
    ]
    np.testing.assert_allclose(np.mean([turn["user"].startswith("\nwhat") for turn in turns]), 0.05, atol=0.01)
    assert {turn["user"].lstrip("\n") for turn in turns} == {turn["user"] for turn in QUESTIONS}


def test_choices_are_lettered_and_get_no_suffix():
    turn = {"user": "which?", "assistant": "blue", "choices": ["red", "blue"]}
    augmentation = Augmentation(suffixes=("\nBe brief.",), sentences=True, line_break=1.0)
    asked = "\nQuestion: which?\nChoices:\nA. red\nB. blue\nAnswer with the letter."
    assert augmentation.of_turns([turn], np.random.default_rng(0)) == [{"user": asked, "assistant": "Answer: B"}]


def test_what_a_turn_lacks_is_left_for_its_kind_to_name(one_source, processor):
    broken = [None, {"user": None, "assistant": "a"}, {"user": "q", "assistant": None}]
    assert Augmentation(suffixes=("x",)).of_turns(broken, np.random.default_rng(0)) == broken
    texts = [{"user": "?", "assistant": "c", "source": "s", "choices": ["a", "b"]}]
    turn = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("choices", pa.list_(pa.string()))])
    schema = pa.schema([cauldron.SCHEMA.field("images"), ("texts", pa.list_(turn))])
    good = [{**texts[0], "assistant": "b"}]
    rows = [{"images": [], "texts": texts}, {"images": [], "texts": good}]
    for chances in ({}, {"sentences": True}):
        config = one_source(rows, "cauldron", schema, max_bad_fraction=0.9)
        packed = next(start(with_augmentation(config, **chances), processor))
        assert set(packed.documents) == {"mine/rows.parquet:1"}
        assert packed.examples == {"choices": "mine/rows.parquet:0"}
        assert "Answer with the letter." in processor.decode(packed.arrays["tokens"][0].tolist())


def test_the_form_is_decided_by_the_document_and_again_on_resuming(one_source, processor):
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    chances = {"suffixes": ("\nBe brief.", "\nOne word."), "line_break": 0.3, "sentences": True}
    config = with_augmentation(one_source(rows, "text", messages.SCHEMA, lookahead=4), **chances)
    iterator, states, packed = start(config, processor), [], []
    for _ in range(4):
        states.append(iterator.get_state())
        packed.append(next(iterator))
    for step in (1, 3):
        resumed = start(dataclasses.replace(config, num_threads=2), processor)
        resumed.set_state(states[step])
        np.testing.assert_array_equal(next(resumed).arrays["tokens"], packed[step].arrays["tokens"])
    text = processor.decode(np.concatenate([step.arrays["tokens"].ravel() for step in packed]).tolist())
    assert all(word in text for word in ("Be brief.", "One word.", "A.", "\nq"))


def test_impossible_chances_are_refused():
    with pytest.raises(UserError, match="augmentation.upscale is 1.5"):
        Augmentation(upscale=1.5)
    with pytest.raises(UserError, match="augmentation.upscale_to is 1.5; it must be more than 1.5"):
        Augmentation(upscale_to=1.5)
    with pytest.raises(UserError, match="shuffle_turns is for kind cauldron or text, not 'pairs'"):
        SourceConfig("mine", "pairs", ("x",), augmentation=Augmentation(shuffle_turns=True))
    with pytest.raises(UserError, match="suffixes, line_break is for kind cauldron or text, not 'pdf'"):
        SourceConfig("mine", "pdf", ("x",), augmentation=Augmentation(suffixes=("x",), line_break=0.1))
    with pytest.raises(UserError, match="augmentation.max_turns is 0"):
        Augmentation(max_turns=0)
