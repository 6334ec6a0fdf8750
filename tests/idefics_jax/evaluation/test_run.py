"""Evaluation: the question is what stands before the answer, the score is what the answer earns."""

import pytest

from idefics_jax.documents import Document, EndOfUtterance, Image, Text
from idefics_jax.errors import UserError
from idefics_jax.evaluation.metrics import exact_match
from idefics_jax.evaluation.questions import question

PARTS = (
    Text("User:", trained=False),
    Image(b"pixels"),
    Text("what is it?", trained=False),
    EndOfUtterance(trained=False),
    Text("\nAssistant:", trained=False),
    Text(" ", trained=True),
    Text("a five", trained=True),
    EndOfUtterance(trained=True),
)


def test_a_question_is_the_document_up_to_its_first_answer():
    found = question(Document(PARTS + PARTS, "set", "row 3"))
    assert found.prompt == PARTS[:5]
    assert found.answer == "a five"
    assert found.images == [b"pixels"]
    assert found.text == "User:what is it? Assistant:"
    assert found.id == "row 3"


def test_a_document_without_an_answer_is_refused_by_name():
    with pytest.raises(UserError, match="set row 7 has no answer"):
        question(Document(PARTS[:5], "set", "7"))


@pytest.mark.parametrize(
    ("answer", "score"), [("Five", 1), (" five. ", 1), ("five  ", 1), ("fives", 0), ("", 0), ("5", 0), ("a five", 0)]
)
def test_exact_match_ignores_case_spaces_and_a_closing_period(answer, score):
    assert exact_match(answer, "five") == score
    assert exact_match("five.", "Five") == 1
