"""Metrics by name: each scores one answer against the reference, from 0 to 1. A new metric enters here."""

from collections.abc import Callable


def exact_match(answer: str, reference: str) -> float:
    """1 where both are the same words, case and a closing period aside (answers of the fine-tuning end in one)."""

    def words(text: str) -> str:
        return " ".join(text.lower().split()).rstrip(". ")

    return float(words(answer) == words(reference))


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match}
