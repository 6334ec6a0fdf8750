"""One line that says how a preparation goes: rates, what was dropped, and the time that is left."""

import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from data_pipelines.rejection import FILTERED
from data_pipelines.units import Report

# Seconds between lines: on a terminal the line is written over, in a log it is a new one.
_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 10.0


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
        if time.monotonic() - self._written >= self._every:
            self._write(reports, done)

    def end(self, reports: Mapping[int, Report], done: Sequence[int]) -> None:
        """Writes the last line."""
        self._write(reports, done)
        if self._stream.isatty():
            self._stream.write("\n")

    def _write(self, reports: Mapping[int, Report], done: Sequence[int]) -> None:
        self._written = time.monotonic()
        seconds = self._written - self._began
        line = f"{len(done)} of {len(self._sizes)} inputs: {describe(list(reports.values()), seconds)}"
        ended, whole = sum(self._sizes[number] for number in done), sum(self._sizes.values())
        if 0 < ended < whole:
            left = int(seconds * (whole / ended - 1))
            line += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        self._stream.write(f"\r{line:<110}" if self._stream.isatty() else f"{line}\n")
        self._stream.flush()


def describe(reports: Sequence[Report], seconds: float) -> str:
    """Returns the rates of what was done, and the counts of what was dropped, in words."""
    documents, images = sum(report.documents for report in reports), sum(report.images for report in reports)
    size = sum(report.bytes for report in reports)
    counts = [(reason, told["documents"]) for report in reports for reason, told in report.dropped.items()]
    filtered = sum(count for reason, count in counts if reason.startswith(FILTERED))
    dropped = sum(count for _, count in counts) - filtered
    return (
        f"{documents / seconds:.0f} documents/s, {images / seconds:.0f} images/s, {size / 2**20 / seconds:.1f} MiB/s, "
        f"{dropped} dropped, {filtered} filtered"
    )
