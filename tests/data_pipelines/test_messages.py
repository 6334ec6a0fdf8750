"""Messages are The Cauldron's conversations without images."""

import pytest

from data_pipelines import cauldron, messages
from data_pipelines.rejection import BadRow


def row(*contents, roles=("user", "assistant") * 3):
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


TURNS = [{"user": "q1", "assistant": "a1"}, {"user": "q2", "assistant": "a2"}]


def test_parts_are_those_of_the_cauldron():
    assert messages.parts(row("q1", "a1", "q2", "a2"), None) == cauldron.parts({"images": None, "texts": TURNS}, None)


def test_a_system_message_begins_the_first_question():
    found = messages.parts(row("be brief", "q1", "a1", roles=("system", "user", "assistant")), None)
    wanted = [{"user": "be brief\nq1", "assistant": "a1"}]
    assert found == cauldron.parts({"images": None, "texts": wanted}, None)


def test_a_system_message_that_says_nothing_adds_nothing():
    for nothing in (None, ""):
        found = messages.parts(row(nothing, "q1", "a1", roles=("system", "user", "assistant")), None)
        assert found == messages.parts(row("q1", "a1"), None)


def test_a_sentence_about_a_row_does_not_hold_the_row():
    with pytest.raises(BadRow) as bad:
        messages.parts(row("q", "a", roles=("x" * 2**20, "y")), None)
    assert len(str(bad.value)) < 1000


def test_it_is_cut_between_turns():
    long = row("q0", "a0", "q1", "a1", "q2", "a2")
    assert messages.units(long) == 3
    assert messages.piece(long, 1, 3) == row("q1", "a1", "q2", "a2")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("q", roles=("user",)), "user and assistant must take turns"),
        (row("a", "q", roles=("assistant", "user")), "user and assistant must take turns"),
        ({"messages": None}, "user and assistant must take turns"),
        ({"messages": [None, None]}, "user and assistant must take turns"),
        (row("q", None), "turn 0 lacks its question or its answer"),
        (row(None, "a"), "turn 0 lacks its question or its answer"),
    ],
)
def test_rows_that_are_no_conversation_are_named(bad, message):
    with pytest.raises(BadRow, match=message):
        messages.parts(bad, None)
