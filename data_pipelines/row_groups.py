"""Row groups of parquet files in memory, those of all sources of a process together, up to a number of bytes.

A row group is as large as whoever wrote it made it, and a mixture of fifty sets shuffles hundreds of them at a time. So
bytes are bounded and not their number; what has been used longest ago goes first, and is read again when it is wanted.
"""

import collections
import threading
from collections.abc import Callable, Hashable

import pyarrow as pa
from absl import logging

# So many must have left before it is said that they leave too early.
_SAMPLE = 64


class RowGroups:
    """The row groups that were used last. Threads may share it."""

    def __init__(self, max_bytes: int):
        """`max_bytes` bounds what is kept; the last row group is kept whatever its size."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._tables: collections.OrderedDict[Hashable, pa.Table] = collections.OrderedDict()
        self._uses: collections.Counter[Hashable] = collections.Counter()
        self._lock = threading.Lock()
        # Of those that have left: how many, their rows, and how many rows had been read of them.
        self._left, self._rows, self._read = 0, 0, 0

    def get(self, key: Hashable, load: Callable[[], pa.Table]) -> pa.Table:
        """Returns a row group to read one row of, loading it if it is not kept.

        Args:
          key: tells it from others of all sources.
          load: reads it; two threads that ask at once may both do so.
        """
        with self._lock:
            self._uses[key] += 1
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        table = load()
        with self._lock:
            if key not in self._tables:
                self._tables[key] = table
                self._bytes += table.nbytes
            while self._bytes > self._max_bytes and len(self._tables) > 1:
                self._let_go(*self._tables.popitem(last=False))
        return table

    def _let_go(self, key: Hashable, table: pa.Table) -> None:
        """Counts a row group that leaves; warns once if most rows of such are still to be read."""
        self._bytes -= table.nbytes
        self._left += 1
        self._rows += table.num_rows
        self._read += self._uses.pop(key, 0)
        if self._left == _SAMPLE and self._read < self._rows / 2:
            logging.warning(
                "row groups of parquet files leave memory with %d of their %d rows read, and are read again for "
                "each of the others: prepare the data (python -m data_pipelines.prepare), or raise "
                "data.row_groups_mib = %d",
                self._read,
                self._rows,
                self._max_bytes // 2**20,
            )
