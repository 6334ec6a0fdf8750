"""Cutting: a document too large for a row becomes several, at the boundaries its kind knows.

A conversation is cut between turns, and every piece has the images; a web page is cut between its texts and images.
A turn or a text that is alone too large stays rejected. The result depends on the document and the row alone.
"""

import bisect
from collections.abc import Callable
from typing import TypeVar

from data_pipelines.rejection import Rejected

# What cutting may mend: the document is too large, not bad.
TOO_LARGE = ("too-many-tokens", "too-many-images", "too-many-patches")

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
      The pieces in order; a unit that is alone too large is there as Rejected.
    """
    pieces, first = [], 0
    while first < units:

        def too_large(end: int, first: int = first) -> bool:
            return is_too_large(make(first, end))

        end = first + max(1, bisect.bisect_left(range(first + 1, units + 1), True, key=too_large))
        pieces.append(make(first, end))
        first = end
    return pieces
