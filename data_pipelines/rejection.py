"""What happens to documents that cannot be used: they are values that are counted, until there are too many."""

import collections
import dataclasses
from collections.abc import Mapping

from idefics_jax.errors import UserError

# The share of rejected documents is judged as if at least this many had been seen, so that one early bad document
# does not look like a hundred per cent.
SMALLEST_SAMPLE = 1000
# After so many rows without a document, one after another, there are taken to be none: what filters take is no damage,
# and the search would not end.
MOST_BARREN = 10_000
# How reasons begin that are no damage: the config's own choice (filters.py), a download known to have failed, or images
# that cutting leaves out (cutting.py).
FILTERED = "filter:"
# The reasons of whole files that break off (tar.py, jsonl.py): what came after is not known, nor how much.
CUT_SHORT = ("broken-tar", "broken-gzip", "broken-jsonl", "broken-parquet")
# The reason of rows in a file that cannot be read at all. They come in clusters, so their share of all documents is
# judged once, before training begins (pipeline.py), and not as they are met.
DAMAGED_FILE = "damaged-file"

# Characters of a sentence about a row: it may quote the row, and a row may hold megabytes.
_LONGEST = 500


class BadRow(ValueError):
    """A row that holds no usable document; `reason` is the word it is counted by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}\u2026")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A document that was turned away: which one, the word it is counted by, and why in a sentence."""

    name: str
    reason: str
    message: str


def is_damage(reason: str) -> bool:
    """Whether documents turned away for a reason count towards the limit as they are met."""
    return not reason.startswith(FILTERED) and reason != DAMAGED_FILE


class Ledger:
    """Counts documents seen and rejected, by reason.

    Attributes:
      seen: documents so far, rejected ones among them.
      rejected: how many were rejected, by reason.
      examples: the name of the first document rejected for each reason.
    """

    def __init__(
        self,
        limit: float,
        seen: int = 0,
        rejected: Mapping[str, int] | None = None,
        examples: Mapping[str, str] | None = None,
    ):
        """`limit` is the share of rejected documents, in [0, 1), above which `reject` raises."""
        self.limit = limit
        self.seen = seen
        self.rejected = collections.Counter(rejected or {})
        self.examples = dict(examples or {})

    def reject(self, document: Rejected) -> None:
        """Counts a rejected document (which must have been counted as seen).

        Raises:
          UserError: of the documents seen, without those rejected for reasons that are no `is_damage`, more than the
            limit are rejected.
        """
        self.rejected[document.reason] += 1
        self.examples.setdefault(document.reason, document.name)
        damage = {reason: count for reason, count in self.rejected.items() if is_damage(reason)}
        damaged = collections.Counter(damage)
        total, seen = damaged.total(), self.seen - (self.rejected.total() - damaged.total())
        if total > self.limit * max(seen, SMALLEST_SAMPLE):
            reasons = ", ".join(f"{reason} {count}" for reason, count in damaged.most_common())
            raise UserError(
                f"{total} of {seen} documents were rejected ({reasons}), more than data.max_bad_fraction = "
                f"{self.limit} allows; the last was {document.name}: {document.message}"
            )
