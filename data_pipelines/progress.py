"""One line that says how a preparation goes: rates, what was dropped, and the time that is left."""

import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from data_pipelines.rejection import FILTERED
from data_pipelines.units import Report

# Seconds between lines: on a terminal the line is written over, in a log it is a new one.
_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 30.0


class Progress:
    """Writes the line now and then."""

    def __init__(self, sizes: Mapping[int, int], stream: TextIO):
        """`sizes` are the inputs' bytes, by the number of their unit: of those that this run does."""
        self._sizes = sizes
        self._stream = stream
        self._every = _TERMINAL_SECONDS if stream.isatty() else _LOG_SECONDS
        self._began = self._written = time.monotonic()

    def show(self, reports: Mapping[int, Report], done: Sequence[int]) -> None:
        """Writes the line if it is time for one; `done` are the numbers of the units that have ended."""
        now = time.monotonic()
        if now - self._written < self._every:
            return
        self._written = now
        line = describe(list(reports.values()), now - self._began)
        ended = sum(self._sizes[number] for number in done)
        if ended:
            left = (now - self._began) * (sum(self._sizes.values()) / ended - 1)
            line += f", {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02} left"
        line = f"{len(done)} of {len(self._sizes)} inputs: {line}"
        self._stream.write(f"\r{line:<110}" if self._stream.isatty() else f"{line}\n")
        self._stream.flush()

    def end(self) -> None:
        """Ends the line."""
        if self._stream.isatty() and self._written > self._began:
            self._stream.write("\n")


def describe(reports: Sequence[Report], seconds: float) -> str:
    """Returns the rates of what was done, and the counts of what was dropped, in words."""
    documents, images, size = (sum(getattr(report, name) for report in reports) for name in _RATES)
    counts = [(reason, told["documents"]) for report in reports for reason, told in report.dropped.items()]
    filtered = sum(count for reason, count in counts if reason.startswith(FILTERED))
    dropped = sum(count for _, count in counts) - filtered
    return (
        f"{documents / seconds:.0f} documents/s, {images / seconds:.0f} images/s, {size / 2**20 / seconds:.1f} MiB/s, "
        f"{dropped} dropped, {filtered} filtered"
    )


_RATES = ("documents", "images", "bytes")
