"""A document too large for a row is cut where its kind may be cut; nothing is lost, and no image leaves its words."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import cauldron, messages, obelics
from data_pipelines.augmentation import Augmentation
from data_pipelines.cutting import beginning, cut
from data_pipelines.pipeline import Stage, batches
from data_pipelines.rejection import Rejected
from idefics_jax.batch import BatchShape
from idefics_jax.errors import UserError
from tests.data_pipelines.pictures import png

ROLES = ("user", "assistant")
TOO_LONG = Rejected("x", "too-many-tokens", "too long")


def start(config, processor):
    return batches(config, processor, process_index=0, process_count=1)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ([3, 3, 3, 3], [(0, 3), (3, 4)]),
        ([9, 1, 8, 2], [(0, 2), (2, 4)]),
        ([4, 11, 5, 5], [(0, 1), "too long", (2, 4)]),
        ([11], ["too long"]),
        ([11, 12, 3, 13], ["too long", "too long", (2, 3), "too long"]),
        ([1] * 25, [(0, 10), (10, 20), (20, 25)]),
    ],
)
def test_pieces_are_as_long_as_they_can_be(sizes, wanted):
    def make(first, end):
        return (first, end) if sum(sizes[first:end]) <= 10 else TOO_LONG

    assert [getattr(piece, "message", piece) for piece in cut(len(sizes), make)] == wanted


@pytest.mark.parametrize("units", [3, 10, 256, 257, 1000])
def test_a_document_with_a_bad_part_is_bad_once_whatever_its_length(units):
    bad = Rejected("x", "corrupt", "no image")

    def make(first, end):
        if first <= units - 2 < end:
            return bad
        return (first, end) if end - first <= 4 else TOO_LONG

    assert cut(units, make) == [bad]


def test_images_that_cutting_leaves_without_text_are_no_damage():
    def make(first, end):
        """Units 0 to 3 are images, 4 is a text, 5 a text too large, 6 an image; four units fit a row."""
        if end - first > 4 or first <= 5 < end:
            return TOO_LONG
        return (first, end) if first <= 4 < end else Rejected(f"x[{first}:{end}]", "nothing-trained", "no text")

    pieces = cut(7, make)
    assert [getattr(piece, "reason", piece) for piece in pieces] == [
        "filter:piece_without_text",
        (4, 5),
        "too-many-tokens",
        "filter:piece_without_text",
    ]


def test_a_document_of_images_alone_is_bad_once():
    def make(first, end):
        return TOO_LONG if end - first > 4 else Rejected(f"x[{first}:{end}]", "nothing-trained", "no text")

    for units in (3, 11, 1000):
        assert [piece.reason for piece in cut(units, make)] == ["nothing-trained"]


def test_cutting_tries_few_pieces_and_none_that_is_much_too_long():
    tried = []

    def make(first, end):
        tried.append(end - first)
        return (first, end) if end - first <= 7 else TOO_LONG

    assert len(cut(10_000, make)) == 1429
    assert max(tried) <= 14
    assert len(tried) < 3 * 1429


def talk(turns, images=1):
    texts = [{"user": f"what is {turn}?", "assistant": f"{turn}", "source": "s"} for turn in range(turns)]
    return {"images": [{"bytes": png(28, 28), "path": None}] * images, "texts": texts}


def texts_of(packed, processor):
    """The documents of a batch as (name, text, number of `<image>` tokens)."""
    names, found, batch = iter(packed.documents), [], packed.arrays
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            ids = tokens[segments == segment]
            images = int((ids == processor.tokenizer.image_token_id).sum())
            found.append((next(names), processor.decode(ids.tolist()), images))
    return found


def test_a_long_conversation_is_cut_between_turns_and_each_piece_has_the_images(one_source, processor):
    config = one_source([talk(12)], "cauldron", cauldron.SCHEMA, lookahead=4)
    found = {}
    iterator = start(config, processor)
    for _ in range(8):
        found |= {name: (text, images) for name, text, images in texts_of(next(iterator), processor)}
    spans = sorted(tuple(map(int, name.rpartition("[")[2].rstrip("]").split(":"))) for name in found)
    assert len(spans) > 1
    assert [first for first, _ in spans] == [0, *[end for _, end in spans[:-1]]]
    assert spans[-1][1] == 12
    for name, (text, images) in found.items():
        first, end = map(int, name.rpartition("[")[2].rstrip("]").split(":"))
        assert images == processor.num_latents
        assert text.split("what is ")[1:][0].startswith(f"{first}?")
        assert text.count("what is") == end - first


def test_a_long_page_is_cut_between_its_parts(one_source, processor):
    rng = np.random.default_rng(0)
    words = [" ".join(["one"] * int(n)) for n in rng.integers(1, 9, 40)]
    row = {"images": [None] * 40, "texts": words, "metadata": "", "general_metadata": ""}
    config = one_source([row], "obelics", obelics.SCHEMA, lookahead=4)
    packed = next(start(config, processor))
    pieces = {name: text for name, text, _ in texts_of(packed, processor)}
    ordered = sorted(pieces, key=lambda name: int(name.rpartition("[")[2].split(":")[0]))
    joined = " ".join(pieces[name] for name in ordered).split()
    assert joined == " ".join(words).split()[: len(joined)]
    assert len(joined) > 50


@pytest.mark.parametrize(("of_source", "most"), [(None, 64), (20, 20), (100, 64)])
def test_a_source_may_have_shorter_documents(of_source, most, one_source, processor):
    row = {"images": [None] * 40, "texts": ["one two"] * 40, "metadata": "", "general_metadata": ""}
    config = one_source([row], "obelics", obelics.SCHEMA, lookahead=4)
    (source,) = config.stages[0].sources
    config = dataclasses.replace(config, stages=(Stage((dataclasses.replace(source, document_tokens=of_source),)),))
    arrays = next(start(config, processor)).arrays
    lengths = [np.bincount(row)[1:].max() for row in arrays["segment_ids"]]
    assert most - 8 < max(lengths) <= most


def test_a_text_that_no_row_holds_is_cut_between_passages(one_source, processor):
    """However long the texts of a page are, none is refused, and every word of them is read once."""
    rng = np.random.default_rng(0)
    words = [" ".join(rng.choice(["one", "two", "six"], int(n))) for n in rng.integers(1, 400, 6)]
    row = {"images": [None] * 6, "texts": words, "metadata": "", "general_metadata": ""}
    shape = BatchShape(rows=1, tokens=256, vision_rows=2, patches=32, images=8)
    config = one_source([row] * 2, "obelics", obelics.SCHEMA, lookahead=1, rounds=0, shape=shape)
    iterator, pieces = start(config, processor), {}
    for _ in range(40):
        packed = next(iterator)
        pieces |= {name: text for name, text, _ in texts_of(packed, processor)}
    assert not packed.rejected
    own = [name for name in pieces if "parquet:0[" in name]
    ordered = sorted(own, key=lambda name: int(name.rpartition("[")[2].split(":")[0]))
    assert " ".join(pieces[name] for name in ordered).split() == " ".join(words).split()


def test_healthy_pages_that_are_cut_have_no_damage(one_source, processor):
    """Pages of texts and images in turns that end on an image, as published ones may, wherever the cuts fall."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        images, texts = [], []
        for _ in range(rng.integers(1, 9)):
            images += [None, "image.png"]
            texts += [" ".join(["one"] * int(rng.integers(1, 20))), None]
        rows.append({"images": images, "texts": texts, "metadata": "", "general_metadata": ""})
    shape = BatchShape(rows=4, tokens=128, vision_rows=2, patches=32, images=8)
    config = one_source(rows, "obelics", obelics.SCHEMA, lookahead=8, shape=shape, max_bad_fraction=0.0)
    (source,) = config.stages[0].sources
    Path(source.image_root, "image.png").write_bytes(png(28, 28))
    iterator = start(config, processor)
    while (packed := next(iterator)).epochs["mine"] < 1:
        pass
    assert packed.seen > 100
    assert not packed.rejected


def test_a_turn_that_no_row_holds_is_counted_and_the_others_stay(one_source, processor):
    row = talk(5)
    for turn in (1, 3, 4):
        row["texts"][turn]["user"] = "five " * 200
    config = one_source([row], "cauldron", cauldron.SCHEMA, lookahead=4, max_bad_fraction=0.9)
    packed = next(start(config, processor))
    times = packed.rejected["too-many-tokens"]
    assert packed.rejected == {"too-many-tokens": times, "filter:further_too_large": 2 * times}, "once a document"
    assert packed.examples["filter:further_too_large"].endswith("[3:4]")
    assert {name.rpartition("[")[2] for name in packed.documents} == {"0:1]", "2:3]"}
    with pytest.raises(UserError, match=r"rows.parquet:0\[1:2\]: it has \d+ characters"):
        next(start(dataclasses.replace(config, max_bad_fraction=0.0), processor))


def test_turns_beyond_those_kept_are_counted(one_source, processor):
    config = one_source([talk(3), talk(1)], "cauldron", cauldron.SCHEMA, lookahead=2, max_bad_fraction=0.0)
    (source,) = config.stages[0].sources
    kept = dataclasses.replace(source, augmentation=Augmentation(max_turns=1))
    iterator = start(dataclasses.replace(config, stages=(Stage((kept,)),)), processor)
    packed = next(iterator)
    long = sum(name.endswith(":0") for name in packed.documents)
    assert long
    assert packed.rejected["filter:turn_beyond_max_turns"] >= 2 * long
    assert packed.rejected["filter:turn_beyond_max_turns"] % 2 == 0
    assert packed.examples == {"filter:turn_beyond_max_turns": "mine/rows.parquet:0"}


@pytest.mark.parametrize("kind", ["cauldron", "text"])
def test_the_end_of_an_answer_that_no_row_holds_is_dropped_and_counted(kind, one_source, processor):
    said = " ".join(f"{i} is next." for i in range(200))
    turns = [("what is 0?", "0"), ("count", said), ("what is 2?", "2")]
    if kind == "cauldron":
        texts = [{"user": user, "assistant": answer, "source": "s"} for user, answer in turns]
        config = one_source([{"images": [], "texts": texts}], kind, cauldron.SCHEMA, lookahead=4, max_bad_fraction=0.0)
    else:
        talk = [{"role": role, "content": text} for turn in turns for role, text in zip(ROLES, turn, strict=True)]
        config = one_source([{"messages": talk}], kind, messages.SCHEMA, lookahead=4, max_bad_fraction=0.0)
    packed = next(start(config, processor))
    assert set(packed.rejected) == {"filter:answer_cut_short"}
    assert packed.examples["filter:answer_cut_short"].endswith("[1:2]")
    (text,) = {text for name, text, _ in texts_of(packed, processor) if name.endswith("[1:2]")}
    question, _, answer = text.partition("Assistant: ")
    assert "count" in question
    assert said.startswith(answer)
    assert f"{said} ".startswith(f"{answer} "), "it ends with a word"
    tokens, segments = packed.arrays["tokens"], packed.arrays["segment_ids"]
    places = [(row, n) for row, own in enumerate(segments) for n in range(1, own.max() + 1)]
    for token, wanted in [
        (processor.tokenizer.end_of_utterance_id, {"0:1]": 2, "1:2]": 1, "2:3]": 2}),
        (processor.tokenizer.eos_id, {"0:1]": 1, "1:2]": 0, "2:3]": 1}),  # which would be learnt as the end
    ]:
        found = {
            name.rpartition("[")[2]: (tokens[row][segments[row] == segment] == token).sum()
            for name, (row, segment) in zip(packed.documents, places, strict=True)
        }
        assert found == wanted
    lengths = [np.bincount(row)[1:].max() for row in packed.arrays["segment_ids"]]
    assert max(lengths) <= 64


@pytest.mark.parametrize("lead", ["", " ", "\n\n", " \n" * 150])
def test_space_alone_is_no_beginning(lead):
    text = f"{lead}one two  three"
    for room, wanted in [(0, None), (3, "one"), (8, "one two"), (12, "one two")]:
        found = beginning(text, lambda text, room=room: text if len(text.strip()) <= room else TOO_LONG)
        assert getattr(found, "reason", found) == (wanted and f"{lead}{wanted}")


@pytest.mark.parametrize("lead", ["", "\n", " "])
def test_turns_beside_an_answer_of_which_no_word_fits_stay(lead, one_source, processor):
    for words in range(20, 60):
        row = talk(2)
        row["texts"].append({"user": "one " * words, "assistant": f"{lead}{'three ' * 99}", "source": "s"})
        config = one_source([row], "cauldron", cauldron.SCHEMA, lookahead=2, max_bad_fraction=0.9)
        packed = next(start(config, processor))
        assert {name.rpartition("[")[2] for name in packed.documents} >= {"0:2]"}
        assert set(packed.rejected) <= {"too-many-tokens", "filter:answer_cut_short"}
        assert len(packed.rejected) == 1


def test_resuming_between_the_pieces_of_a_document_goes_on_to_the_bit(one_source, processor):
    config = one_source([talk(12), talk(3), talk(30)], "cauldron", cauldron.SCHEMA, lookahead=6)
    iterator = start(config, processor)
    states, packed = [], []
    for _ in range(8):
        states.append(iterator.get_state())
        packed.append(next(iterator))
    for step, state in enumerate(states):
        resumed = start(config, processor)
        resumed.set_state(state)
        again = next(resumed)
        assert again.documents == packed[step].documents
        np.testing.assert_array_equal(again.arrays["tokens"], packed[step].arrays["tokens"])
