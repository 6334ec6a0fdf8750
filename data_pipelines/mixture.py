"""Which source each document comes from: shares by weight, stage after stage, as a pure function of an index.

Shares are exact over blocks of a few hundred documents, within which each source's documents lie evenly, by chance.
A source keeps its position where a stage ends: the next one goes on with the documents that come after. (Grain's own
mix starts every source anew in each mixture, and has no such blocks.)
"""

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

# A block holds at least so many documents, and so many of the rarest source.
_LEAST_BLOCK, _LEAST_SHARE = 256, 4


class Mixture:
    """The endless sequence of (source, position in it) of one shard."""

    def __init__(
        self,
        stages: Sequence[tuple[Mapping[str, float], int | None]],
        *,
        start: Mapping[str, int],
        first: Sequence[tuple[str, int]],
        seed: Sequence[int],
    ):
        """Fixes the sequence.

        Args:
          stages: for each the weights of its sources by name, and how many documents it lasts; None for the last.
          start: the position that a source begins at; 0 where it is not named.
          first: (source, position) of documents that come before all others and count in no stage.
          seed: of the order within blocks.

        Sources that no stage names are kept for a later run: their positions, and of `first` in `set_aside`.
        """
        self.names = tuple(dict.fromkeys(name for weights, _ in stages for name in weights))
        self._start = dict(start)
        self._first = [(name, position) for name, position in first if name in self.names]
        self.set_aside = [(name, position) for name, position in first if name not in self.names]
        self.leads = len(self._first)  # documents before the first stage
        self._seed = tuple(seed)
        self._shares = [_cumulative(weights, self.names) for weights, _ in stages]
        self._ends = list(itertools.accumulate(length for _, length in stages[:-1]))
        self._sizes = [_block_size(weights) for weights, _ in stages]
        self._block = functools.lru_cache(maxsize=4)(self._make_block)
        # The position that each source has at the beginning of a stage.
        self._bases = [np.array([start.get(name, 0) for name in self.names], np.int64)]
        for begin, end in zip([0, *self._ends], self._ends, strict=False):
            self._bases.append(self._bases[-1] + self._within(len(self._bases) - 1, end - begin))

    def __call__(self, index: int) -> tuple[str, int]:
        """Returns the source of the index-th document, and the document's position in that source."""
        if index < self.leads:
            return self._first[index]
        stage, index = self._stage(index)
        block, slot = divmod(index, self._sizes[stage])
        sources, positions = self._block(stage, block)
        return self.names[sources[slot]], int(positions[slot])

    def positions(self, index: int) -> dict[str, int]:
        """Returns the position that each source has reached before the index-th document."""
        stage, index = self._stage(index)
        reached = self._bases[stage] + self._within(stage, index)
        return self._start | dict(zip(self.names, reached.tolist(), strict=True))

    def _stage(self, index: int) -> tuple[int, int]:
        """Returns the stage of an index, and the index within it."""
        index = max(0, index - self.leads)
        stage = bisect.bisect_right(self._ends, index)
        return stage, index - (self._ends[stage - 1] if stage else 0)

    def _within(self, stage: int, count: int) -> np.ndarray:
        """Returns int64 [names]: how many of the first `count` documents of a stage come from each source."""
        block, slot = divmod(count, self._sizes[stage])
        sources, _ = self._block(stage, block)
        return self._before(stage, block) + np.bincount(sources[:slot], minlength=len(self.names))

    def _before(self, stage: int, block: int) -> np.ndarray:
        """Returns int64 [names]: how many documents of each source the blocks before this one hold."""
        reached = np.floor(block * self._sizes[stage] * self._shares[stage] + 0.5).astype(np.int64)
        return np.diff(reached, prepend=0)

    def _make_block(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each slot of a block, and the position in that source."""
        rng = np.random.default_rng((*self._seed, stage, block))
        before = self._before(stage, block)
        quotas = self._before(stage, block + 1) - before
        sources = np.repeat(np.arange(len(quotas)), quotas)
        ranks = np.concatenate([np.arange(quota) for quota in quotas])
        order = np.argsort((ranks + rng.random(len(ranks))) / quotas[sources], kind="stable")
        return sources[order], (self._bases[stage] + before)[sources[order]] + ranks[order]


def _cumulative(weights: Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    """Returns float64 [names]: the share of each source and those before it; the last is exactly 1."""
    reached = np.cumsum([weights.get(name, 0.0) for name in names])
    return reached / reached[-1]


def _block_size(weights: Mapping[str, float]) -> int:
    """Returns a power of two: the documents of a block."""
    rarest = min(weights.values()) / sum(weights.values())
    return 1 << int(np.ceil(np.log2(max(_LEAST_BLOCK, _LEAST_SHARE / rarest))))
