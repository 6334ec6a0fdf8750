"""The order in which documents are read: a pure function of shard and index, so any position can be returned to.

Every epoch shuffles the row groups, and the rows within a window of neighbouring row groups. Each virtual shard takes
an equal, contiguous share of that order: over an epoch every document is read exactly once, and a shard only touches
the row groups of its own share.
"""

import functools

import numpy as np


class EpochOrder:
    """Endless epochs over rows that lie in groups."""

    def __init__(self, group_rows: np.ndarray, *, window: int, seed: int, shards: int):
        """Fixes the order.

        Args:
          group_rows: int [groups], rows in each row group.
          window: neighbouring row groups (after shuffling) whose rows are shuffled together.
          seed: two orders are equal if their seeds and rows are.
          shards: V, how many share an epoch; at most the number of rows.
        """
        self._total = int(group_rows.sum())
        if self._total < shards:
            raise ValueError(f"{self._total} rows cannot be shared by {shards} shards; use at most {self._total}")
        self._group_rows = group_rows
        self._window = window
        self._seed = seed
        self._shards = shards
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)
        self._window_order = functools.lru_cache(maxsize=2 * shards)(self._make_window_order)

    def __call__(self, shard: int, index: int) -> tuple[int, int, int]:
        """Returns (epoch, row group, row within it) of the index-th row that a shard reads."""
        epoch, position = divmod(index, self.length(shard))
        position += self._first(shard)
        groups, starts = self._epoch(epoch)
        window = (int(np.searchsorted(starts, position, side="right")) - 1) // self._window
        within = self._window_order(epoch, window)[position - starts[window * self._window]]
        position = int(starts[window * self._window] + within)
        place = int(np.searchsorted(starts, position, side="right")) - 1
        return epoch, int(groups[place]), int(position - starts[place])

    def length(self, shard: int) -> int:
        """Returns how many rows a shard reads in an epoch."""
        return self._first(shard + 1) - self._first(shard)

    def _first(self, shard: int) -> int:
        return self._total * shard // self._shards

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the epoch's order of row groups, and the position of each one's first row."""
        groups = np.random.default_rng((self._seed, epoch)).permutation(len(self._group_rows))
        return groups, np.concatenate([[0], np.cumsum(self._group_rows[groups])])

    def _make_window_order(self, epoch: int, window: int) -> np.ndarray:
        _, starts = self._epoch(epoch)
        first = window * self._window
        last = min(first + self._window, len(starts) - 1)
        return np.random.default_rng((self._seed, epoch, window)).permutation(starts[last] - starts[first])
