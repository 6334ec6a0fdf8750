"""The forms of questions and answers in instruction tuning, as the authors' code writes them.

    short answer      {question}{suffix}                          ->  {Answer}.
    multiple choice   Question: {question}\\nChoices:\\nA. {first}
                      B. {second}\\nAnswer with the letter.        ->  Answer: B

They are for question sets of one's own: a set whose questions already ask so must not get them twice. The authors draw
the suffix from eight. One of them is known here to the letter, because the evaluation uses it too (`BRIEF`); the others
are for the config to give.
"""

import string
from collections.abc import Sequence
from typing import Any

from data_pipelines.rejection import BadRow

BRIEF = "\nGive a very brief answer."
# The one line of the multiple-choice form that asks (evaluation prompts of the paper's appendix A.3.1).
_LETTER = "Answer with the letter."
_ENDS = (".", "!", "?")


def as_sentence(answer: str) -> str:
    """Returns an answer with a capital first letter and, unless it ends like a sentence, a final period."""
    answer = answer.strip()
    if not answer:
        return answer
    return f"{answer[0].upper()}{answer[1:]}{'' if answer.endswith(_ENDS) else '.'}"


def multiple_choice(question: str, choices: Sequence[str], right: int) -> tuple[str, str]:
    """Returns the question with its lettered choices, and the answer that names one.

    Args:
      question: as asked, without choices.
      choices: 1 to 26 of them.
      right: which one is right, from 0.

    Raises:
      BadRow: there are no choices or more than letters, or none is at `right`.
    """
    if not 0 < len(choices) <= len(string.ascii_uppercase):
        raise BadRow("choices", f"a question has {len(choices)} choices; letters name 1 to 26, drop the others")
    if not 0 <= right < len(choices):
        raise BadRow("choices", f"the right choice is number {right} of {len(choices)} counted from 0; mend it")
    lettered = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]
    asked = "\n".join([f"Question: {question}", "Choices:", *lettered, _LETTER])
    return asked, f"Answer: {string.ascii_uppercase[right]}"


def written_out(turn: dict[str, Any]) -> dict[str, Any]:
    """Returns a turn that holds `choices` (its answer is one of them, to the letter) in the multiple-choice form.

    Raises:
      BadRow: its answer is none of its choices, or see `multiple_choice`.
    """
    choices = turn.get("choices")
    if not choices:
        return turn
    if not all(isinstance(choice, str) for choice in choices) or turn["assistant"] not in choices:
        raise BadRow("choices", f"a turn's answer is none of its {len(choices)} choices; write it as the choice is")
    user, answer = multiple_choice(turn["user"], choices, choices.index(turn["assistant"]))
    return {"user": user, "assistant": answer}
