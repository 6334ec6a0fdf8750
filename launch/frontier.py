"""Which of many settings are at the edge of what fits, found with few tries, as each takes minutes of compiling."""

from collections.abc import Callable, Sequence
from typing import Any


def frontier(policies: Sequence[str], tried: Callable[[str, str], Any]) -> dict[tuple[str, str], Any]:
    """Finds the pairs of policies that fit where with more kept of either they would not.

    What fits goes on to fit where less is kept. So one walk along the edge finds all of it, in at most twice as many
    tries as there are policies.

    Args:
      policies: from what keeps most to what keeps least.
      tried: gives something for a pair that fits, else None.

    Returns:
      What was given for each pair, those that keep most of the first before the others.
    """
    found, second = {}, len(policies) - 1
    for first in policies:
        best = None
        while second >= 0 and (given := tried(first, policies[second])) is not None:
            best, second = ((first, policies[second]), given), second - 1
        if best is not None:
            found[best[0]] = best[1]
    return found


def divisors(whole: int) -> list[int]:
    """Returns the numbers that divide another, in order."""
    return [number for number in range(1, whole + 1) if whole % number == 0]
