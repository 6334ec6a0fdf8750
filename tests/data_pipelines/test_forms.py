"""Questions and answers in the forms of instruction tuning."""

import pytest

from data_pipelines.forms import as_sentence, multiple_choice, written_out
from data_pipelines.rejection import BadRow


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("red", "Red."),
        ("Red.", "Red."),
        ("really?", "Really?"),
        ("7", "7."),
        (" two words ", "Two words."),
        ("iPhone 4S", "IPhone 4S."),
        ("éa", "Éa."),
        ("", ""),
    ],
)
def test_an_answer_becomes_a_sentence(answer, sentence):
    assert as_sentence(answer) == sentence


def test_choices_are_lettered_as_in_the_paper():
    asked, answer = multiple_choice("Which gas?", ["Oxygen", "Helium", "Argon"], 1)
    assert asked == "Question: Which gas?\nChoices:\nA. Oxygen\nB. Helium\nC. Argon\nAnswer with the letter."
    assert answer == "Answer: B"


@pytest.mark.parametrize(("choices", "right"), [([], 0), (["a"] * 27, 0), (["a"], 1), (["a"], -1)])
def test_choices_that_no_letter_names_are_refused(choices, right):
    with pytest.raises(BadRow) as refused:
        multiple_choice("?", choices, right)
    assert refused.value.reason == "choices"


def test_a_turn_with_choices_is_written_out_by_its_answer():
    turn = {"user": "?", "assistant": "b", "choices": ["a", "b"]}
    assert written_out(turn)["assistant"] == "Answer: B"
    plain = {"user": "?", "assistant": "b", "choices": None}
    assert written_out(plain) is plain
    for choices in (["a", "c"], ["b", None]):
        with pytest.raises(BadRow, match="none of its 2 choices"):
            written_out({**turn, "choices": choices})
