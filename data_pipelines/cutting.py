"""Cutting: a document too large for a row becomes several, at the boundaries its kind knows.

A conversation is cut between turns, and every piece has the images; a web page and scanned pages are cut between
passages. Of a turn that is alone too large the end of the answer is dropped, and counted; a turn whose question is too
large, or a passage, is rejected. The result depends on the document and the row alone.

Images that cutting leaves without text are left out. That is no damage, unless the whole document has none.
"""

import bisect
import dataclasses
import re
from collections.abc import Callable
from typing import TypeVar

from data_pipelines.passages import passages
from data_pipelines.rejection import FILTERED, Rejected

# What cutting may mend: the document is too large, not bad.
TOO_LARGE = ("too-many-tokens", "too-many-images", "too-many-patches")
# What a longer piece may mend: so far it has images alone.
TOO_SHORT = ("nothing-trained",)
# The reason of pieces that have images alone, of a document that has text.
LEFT_OUT = f"{FILTERED}piece_without_text"
# The reason of what is alone too large in a document that has been counted for it.
FURTHER = f"{FILTERED}further_too_large"
# The reason that an answer whose end was dropped is counted by.
CUT_SHORT = f"{FILTERED}answer_cut_short"
# A document of so many units is tried whole first. A longer one is not: ten thousand images would be read for nothing.
_TRIED_WHOLE = 256

Piece = TypeVar("Piece")


def is_too_large(prepared: object) -> bool:
    """Whether a document was rejected for a size that cutting may mend."""
    return isinstance(prepared, Rejected) and prepared.reason in TOO_LARGE


def cut(units: int, make: Callable[[int, int], Piece | Rejected]) -> list[Piece | Rejected]:
    """Cuts a document into pieces, each as long as it can be.

    Args:
      units: how many units it has (turns, texts and images).
      make: prepares the piece of units [first, end); with more units a piece is larger.

    Returns:
      The pieces in order, Rejected in place of each unit that is alone too large; after the first of them the reason is
      FURTHER. If a piece is bad, that alone: the document is bad as it would be in one piece, and counts once.
    """
    pieces, first, guess = [], 0, units if units <= _TRIED_WHOLE else 1
    counted = False  # whether a unit was too large
    while first < units:
        piece, end = _longest(first, units, guess, make)
        if _is_bad(piece):
            return [piece]
        if is_too_large(piece):
            piece, counted = dataclasses.replace(piece, reason=FURTHER) if counted else piece, True
        pieces.append(piece)
        first, guess = end, end - first
    return _without_text_left_out(pieces)


def beginning(text: str, make: Callable[[str], Piece | Rejected]) -> Piece | Rejected | None:
    """Prepares the longest beginning of a text that is not too large: some of its words, never all of them.

    Args:
      text: what is alone too large.
      make: prepares a document of a beginning of it; of a longer one it is larger.

    Returns:
      What was prepared, or None if the first word is too large.
    """
    # A script without spaces has no words, but passages. Space alone is no beginning: it goes with the word behind it.
    stretches = [""]
    for word in (word for passage in passages(text) for word in re.findall(r"\S+\s*|\s+", passage)):
        if stretches[-1].strip() or not stretches[-1]:
            stretches.append(word)
        else:
            stretches[-1] += word
    del stretches[0]

    def made(count: int) -> Piece | Rejected:
        return make("".join(stretches[:count]).rstrip())

    fits = bisect.bisect_left(range(1, len(stretches)), True, key=lambda count: is_too_large(made(count)))
    return made(fits) if fits else None


def _without_text_left_out(pieces: list[Piece | Rejected]) -> list[Piece | Rejected]:
    """Tells pieces of images alone from a document of images alone, which is bad and one."""
    if all(_is_too_short(piece) for piece in pieces):
        return pieces[:1]
    return [dataclasses.replace(piece, reason=LEFT_OUT) if _is_too_short(piece) else piece for piece in pieces]


def _longest(first: int, units: int, guess: int, make: Callable[[int, int], Piece | Rejected]) -> tuple:
    """Returns the longest piece from `first` that is not too large, or one that is bad, and its end.

    It begins at a guess, and no piece it tries is more than twice as long as the one it finds or guesses.
    """
    made: dict[int, Piece | Rejected] = {}

    def too_large(end: int) -> bool:
        made[end] = make(first, end)
        return is_too_large(made[end])

    fits, end, step = first, min(units, first + guess), 1
    while not too_large(end):
        if end == units or _is_bad(made[end]):
            return made[end], end
        fits, end, step = end, min(units, end + step), 2 * step
    fits += bisect.bisect_left(range(fits + 1, end), True, key=too_large)
    fits = max(fits, first + 1)
    return made[fits], fits


def _is_bad(piece: object) -> bool:
    return isinstance(piece, Rejected) and piece.reason not in (*TOO_LARGE, *TOO_SHORT)


def _is_too_short(piece: object) -> bool:
    return isinstance(piece, Rejected) and piece.reason in TOO_SHORT
