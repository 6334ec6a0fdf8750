"""The order in which documents are read: a pure function of an index, so any position can be returned to.

Every epoch shuffles the row groups, and the rows within a window of neighbouring row groups. All processes agree on
that order and each takes an equal, contiguous share of it: over an epoch every document is read exactly once, and a
process only touches the row groups of its own share.
"""

import functools

import numpy as np


class EpochOrder:
    """Endless epochs over rows that lie in groups."""

    def __init__(self, group_rows: np.ndarray, *, window: int, seed: int, shard_index: int, shard_count: int):
        """Fixes the order.

        Args:
          group_rows: int [groups], rows in each row group.
          window: neighbouring row groups (after shuffling) whose rows are shuffled together.
          seed: two orders are equal if their seeds and rows are.
          shard_index: which share to follow, from 0.
          shard_count: how many shares there are; at most the number of rows.
        """
        total = int(group_rows.sum())
        if total < shard_count:
            raise ValueError(f"{total} rows cannot be shared by {shard_count} processes; use at most {total}")
        self._group_rows = group_rows
        self._window = window
        self._seed = seed
        self._first = total * shard_index // shard_count
        self._length = total * (shard_index + 1) // shard_count - self._first
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)
        self._window_order = functools.lru_cache(maxsize=4)(self._make_window_order)

    def __call__(self, index: int) -> tuple[int, int]:
        """Returns (row group, row within it) of the index-th row that this share reads."""
        epoch, position = divmod(index, self._length)
        position += self._first
        groups, starts = self._epoch(epoch)
        window = (int(np.searchsorted(starts, position, side="right")) - 1) // self._window
        within = self._window_order(epoch, window)[position - starts[window * self._window]]
        position = int(starts[window * self._window] + within)
        place = int(np.searchsorted(starts, position, side="right")) - 1
        return int(groups[place]), int(position - starts[place])

    def epoch(self, index: int) -> int:
        """Returns the epoch of the index-th row."""
        return index // self._length

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the epoch's order of row groups, and the position of each one's first row."""
        groups = np.random.default_rng((self._seed, epoch)).permutation(len(self._group_rows))
        return groups, np.concatenate([[0], np.cumsum(self._group_rows[groups])])

    def _make_window_order(self, epoch: int, window: int) -> np.ndarray:
        _, starts = self._epoch(epoch)
        first = window * self._window
        last = min(first + self._window, len(starts) - 1)
        return np.random.default_rng((self._seed, epoch, window)).permutation(starts[last] - starts[first])
