"""Signs that a run goes wrong: steps that are not finite, spikes of the loss, and a loss that has left for good.

The host sees them in the metrics that it fetches anyway, a few steps late. The paper (section 3.2) saw training with
everything unfrozen diverge; a run should say so by itself, and name the last checkpoint from before.
"""

import collections
import copy
import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from idefics_jax.errors import UserError

# Losses that "usual" is the median of, and how many must be known before a spike is told.
HISTORY, ENOUGH = 100, 20
# A spike is this many robust standard deviations above the usual loss, and this share of it.
DEVIATIONS, LEAST_RISE = 6.0, 0.1
# Far up: above the best mean by this share of it, by this many nats and by this many of the standard deviations that
# noise gives the difference of a loss from it.
FAR, FAR_NATS, FAR_DEVIATIONS = 0.5, 0.5, 2.0
# Share of a window that may be lower without the loss being down again, and what "on its way back" takes in a window.
LOWER, WAY_BACK = 0.25, 0.02
# Other data: the shares of the sources differ by this part of what they could beyond chance. Chance is what two draws
# from the same shares differ by, at most, in this part of so many pairs.
OTHER_DATA, SURE, DRAWS = 0.5, 0.99, 200


class Stopped(UserError):
    """A run that must not go on.

    Attributes:
      step: the first that is in doubt, counted from 0.
      sound: the last number of steps whose parameters are not.
      documents: of that step.
    """

    def __init__(self, step: int, sound: int, what: str, documents: Sequence[str]):
        self.step = step
        self.sound = sound
        self.documents = tuple(documents)
        super().__init__(f"{what}; its documents: {named(documents)}")


class Halted(Stopped):
    """A step whose numbers are not finite; the parameters are those before it."""

    def __init__(self, step: int, loss: float, documents: Sequence[str]):
        super().__init__(step, step, f"the loss or its gradient is not finite at step {step} (loss {loss})", documents)


class Diverged(Stopped):
    """A loss that rose and stayed; the parameters it rose with are in doubt."""

    def __init__(self, step: int, after: int, level: float, loss: float, documents: Sequence[str]):
        what = (
            f"the loss has diverged: it rose at step {step} from {level:.3f} and after {after} steps it is {loss:.3f}"
        )
        super().__init__(step, step - 1, what, documents)


def named(documents: Sequence[str]) -> str:
    """Returns the first documents of a batch by name, and how many more there are."""
    more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
    return ", ".join(documents[:8]) + more


@dataclasses.dataclass
class _Seen:
    """What a watch knows: its state."""

    # The last losses, and whether the last one was a spike.
    history: list[float] = dataclasses.field(default_factory=list)
    spiking: bool = False
    # The best mean so far, and what is far above it.
    level: float = 0.0
    limit: float = sys.float_info.max
    # Steps that the loss has been far up, the first of them and that one's documents.
    up: int = 0
    began: int = -1
    documents: list[str] = dataclasses.field(default_factory=list)
    # How many documents of each source, about a window's before that step and all since.
    usual_sources: dict[str, float] = dataclasses.field(default_factory=dict)
    sources: dict[str, float] = dataclasses.field(default_factory=dict)


class LossWatch:
    """Follows the loss of a run, step by step; its state is plain JSON and goes into checkpoints.

    What the loss has diverged from is the best that any window of `diverged_after` steps reached, so neither a slow
    rise nor a long one is forgotten; the first window also counts while it grows, from the first loss on, so neither is
    what a trained model began with. Only a change of the data lets go of it: other sources, or other shares of them.
    """

    def __init__(self, diverged_after: int, state: dict[str, Any] | None):
        """Starts, or goes on from the `state` of another.

        Args:
          diverged_after: steps that a loss must stay far up before the run is stopped; 0 never stops it.
          state: what `state()` returned, or None.
        """
        self._window = diverged_after
        self._seen = _Seen(**copy.deepcopy(state or {}))

    def state(self) -> dict[str, Any]:
        """Returns what another needs to go on."""
        return dataclasses.asdict(self._seen)

    @property
    def sound(self) -> int | None:
        """While the loss is far up, the last number of steps from before; otherwise None."""
        return self._seen.began - 1 if self._seen.up else None

    def see(self, step: int, loss: float, documents: Sequence[str]) -> None:
        """Takes a step's finite loss and the documents of its batch, "source/name"; prints a line when a spike begins.

        Raises:
          Diverged: the loss has stayed far up for `diverged_after` steps and is not on its way back.
        """
        self._tell_spike(step, loss, documents)
        self._seen.history = [*self._seen.history, loss][-max(HISTORY, self._window) :]
        if self._window:
            self._follow(step, loss, documents)

    def _tell_spike(self, step: int, loss: float, documents: Sequence[str]) -> None:
        seen = self._seen
        known = seen.history[-HISTORY:]
        if len(known) < ENOUGH:
            return
        usual = statistics.median(known)
        deviation = 1.4826 * statistics.median(abs(before - usual) for before in known)
        spiking = loss > usual + max(DEVIATIONS * deviation, LEAST_RISE * usual)
        if spiking and not seen.spiking and not seen.up:
            print(
                f"loss spike at step {step}: {loss:.3f}, usually {usual:.3f}; its documents: {named(documents)}",
                flush=True,
            )
        seen.spiking = spiking

    def _follow(self, step: int, loss: float, documents: Sequence[str]) -> None:
        """Counts the steps that the loss is far up, and judges it once they are enough."""
        seen = self._seen
        if not seen.up and loss > seen.limit:
            seen.began, seen.documents, seen.sources = step, list(documents), {}
        if seen.up or loss > seen.limit:
            seen.up += 1
            seen.sources = _counted(seen.sources, documents, 1.0)
        else:
            seen.usual_sources = _counted(seen.usual_sources, documents, 1 - 1 / self._window)
        recent = seen.history[-self._window :]
        risen = recent[-seen.up :] if seen.up else []
        if sum(loss <= seen.limit for loss in risen) > LOWER * len(risen):
            seen.up = 0
        if seen.up >= self._window:
            self._judge(recent)
        self._set_limit(recent)

    def _set_limit(self, recent: list[float]) -> None:
        """Sets what is far above the last window, if it is the best; before there is one, above the best it began with.

        The noise of one loss shows in those after it: what the first ones set is set anew until the window is full.
        """
        seen = self._seen
        counts = [len(recent)]
        if len(recent) < self._window:
            seen.limit, counts = sys.float_info.max, range(1, len(recent) + 1)
        noise = _noise(recent)
        for count in counts:
            mean = statistics.fmean(recent[:count])
            limit = mean + max(FAR * mean, FAR_NATS, FAR_DEVIATIONS * noise * math.sqrt(1 + 1 / count))
            if limit < seen.limit:
                seen.level, seen.limit = mean, limit

    def _judge(self, recent: list[float]) -> None:
        """Stops the run, unless the loss is on its way back or the data is other data, whose loss is its own."""
        seen = self._seen
        middle = len(recent) // 2
        before, after = statistics.median(recent[:middle]), statistics.median(recent[middle:])
        if after < (1 - WAY_BACK) * before:
            return
        if not _other_data(seen.usual_sources, seen.sources):
            raise Diverged(seen.began, seen.up, seen.level, after, seen.documents)
        print(
            f"the loss has been up since step {seen.began}, {after:.3f} where it was {seen.level:.3f}; the data "
            "changed, so this is taken for its usual",
            flush=True,
        )
        seen.up, seen.usual_sources = 0, seen.sources
        seen.limit = sys.float_info.max  # until this window sets it, in the same step


def _noise(losses: list[float]) -> float:
    """Returns the standard deviation of losses about a level that may move, by how one differs from the next."""
    steps = [(after - before) ** 2 for before, after in itertools.pairwise(losses)]
    return math.sqrt(statistics.fmean(steps) / 2) if steps else 0.0


def _counted(counts: Mapping[str, float], documents: Sequence[str], kept: float) -> dict[str, float]:
    """Returns the documents of each source with these added; of the earlier ones a part is kept."""
    new = collections.Counter(name.partition("/")[0] for name in documents if "/" in name)
    return {name: kept * counts.get(name, 0.0) + new[name] for name in {**counts, **new}}


def _other_data(before: Mapping[str, float], since: Mapping[str, float]) -> bool:
    """Whether the documents of each source, before and since, show other shares of the sources.

    Their distance is the share of documents that come from other sources (total variation). Few documents of many
    sources are far apart by chance alone, up to having nothing in common; so what as many documents differ by that are
    drawn from the shares of all together is taken off, as Cohen's kappa does.
    """
    counts = np.array([[part.get(name, 0.0) for name in {**before, **since}] for part in (before, since)])
    sizes = counts.sum(axis=1)
    if not sizes.round().all():
        return False
    draw, together = np.random.default_rng(0).multinomial, counts.sum(axis=0) / sizes.sum()
    drawn = [draw(round(size), together, DRAWS) / round(size) for size in sizes]
    chance = np.quantile(np.abs(drawn[0] - drawn[1]).sum(axis=1) / 2, SURE)
    distance = np.abs(counts[0] / sizes[0] - counts[1] / sizes[1]).sum() / 2
    return bool(distance > chance + OTHER_DATA * (1 - chance))
