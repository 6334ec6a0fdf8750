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
from collections.abc import Sequence
from typing import Any

import numpy as np

from idefics_jax.errors import UserError
from idefics_jax.training.suspects import named

# Losses that "usual" is the median of, and how many must be known before a spike is told; as many that are far up at
# the end of a run are no spike.
HISTORY, ENOUGH = 100, 20
# A spike is this many robust standard deviations above the usual loss, and this share of it.
DEVIATIONS, LEAST_RISE = 6.0, 0.1
# Far up: above the larger of a guess and the first loss by this share; or above the best mean by this share of it, by
# this many of the standard deviations that noise gives the difference of a loss from it, and by this many nats; of a
# small mean, by this many times itself, but some nats still.
FAR, FAR_DEVIATIONS = 0.5, 2.0
FAR_NATS, FAR_TIMES, LEAST_NATS = 0.5, 2.0, 0.1
# No loss is usual that is above the larger of a guess and the first loss by more nats than this.
MOST_NATS = 2.0
# A mean that is above the best one by this share of it, and by so many standard deviations of their difference, is told
# of: too little to stop for, as other data may do as much.
RISEN, RISEN_DEVIATIONS = 0.15, 3.0
# Share of a window that may be lower without the loss being down again, and what "on its way back" takes in a window.
LOWER, WAY_BACK = 0.25, 0.02
# Other data: the shares of the sources differ by this part of what they could beyond chance. Chance is what two draws
# from the same shares differ by, at most, in this part of so many pairs.
OTHER_DATA, SURE, DRAWS = 0.5, 0.99, 200
# A rise comes with other data if the data changed within this part of a window of it, or may have, as near as the odds
# of its documents tell (in nats).
NEAR, LIKELY = 0.1, 3.0
# The usual loss of no data is above this share of a guess's if the run began below: a model that has forgotten all but
# how often each token comes has some two thirds of it.
LEARNT = 0.5


class Stopped(UserError):
    """A run that must not go on.

    Attributes:
      step: the first that is in doubt, counted from 0.
      sound: the last number of steps whose parameters are not.
      what: what has happened, in words.
      documents: of that step.
    """

    def __init__(self, step: int, sound: int, what: str, documents: Sequence[str]):
        self.step = step
        self.sound = sound
        self.what = what
        self.documents = tuple(documents)
        super().__init__(f"{what}; its documents: {named(documents)}")


class Halted(Stopped):
    """A step whose numbers are not finite; the parameters are those before it."""

    def __init__(self, step: int, loss: float, grad_norm: float, documents: Sequence[str]):
        if math.isfinite(loss) and math.isfinite(grad_norm):
            what = f"the update of the parameters is not finite at step {step}, its loss ({loss}) and gradient are"
        else:
            what = f"the loss or its gradient is not finite at step {step} (loss {loss})"
        super().__init__(step, step, what, documents)


class Diverged(Stopped):
    """A loss that rose and stayed; the parameters it rose with are in doubt."""

    def __init__(self, step: int, after: int, level: float, loss: float, documents: Sequence[str]):
        what = (
            f"the loss has diverged: it rose at step {step} from {level:.3f} and after {after} steps it is {loss:.3f}"
        )
        super().__init__(step, step - 1, what, documents)


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
    # The loss and how many documents of each source, in the last window before that step and the first since.
    steps: list[tuple[float, dict[str, int]]] = dataclasses.field(default_factory=list)
    # The first loss; the best mean of a window, and whether a rise above it has been told.
    first: float | None = None
    best: float = sys.float_info.max
    risen: bool = False


class LossWatch:
    """Follows the loss of a run, step by step; its state is plain JSON and goes into checkpoints.

    What the loss has diverged from is the best that any window of `diverged_after` steps reached, so neither a slow
    rise nor a long one is forgotten; the first window also counts while it grows, from the first loss on, so neither is
    what a trained model began with. Only a rise that comes with a change of the data lets go of it, to other sources or
    other shares of them, and to no more than what the usual loss of any data may be.
    """

    def __init__(self, diverged_after: int, state: dict[str, Any] | None, *, vocabulary: int):
        """Starts, or goes on from the `state` of another.

        Args:
          diverged_after: steps that a loss must stay far up before the run is stopped; 0 never stops it.
          state: what `state()` returned, or None.
          vocabulary: number of tokens that the model tells apart.

        Raises:
          UserError: the state was saved by code that watched in another way.
        """
        self._window = diverged_after
        self._guess = math.log(vocabulary)
        other = set(state) ^ {field.name for field in dataclasses.fields(_Seen)} if state else ()
        if other:
            raise UserError(
                f"the checkpoint was saved by other code, which watched the loss in another way ({min(other)}); go on "
                "with that code, or start a new run"
            )
        self._seen = _Seen(**copy.deepcopy(state or {}))

    def state(self) -> dict[str, Any]:
        """Returns what another needs to go on."""
        return dataclasses.asdict(self._seen)

    @property
    def sound(self) -> int | None:
        """While the loss is far up, the last number of steps from before; otherwise None."""
        return self._seen.began - 1 if self._seen.up else None

    def see(self, step: int, loss: float, documents: Sequence[str]) -> str | None:
        """Takes a step's finite loss and the documents of its batch, "source/name".

        Returns:
          A sentence about the spike that begins with this step, or about a rise that has been slow or small, if there
          is one to tell.

        Raises:
          Diverged: the loss has stayed far up for `diverged_after` steps and is not on its way back.
        """
        spike = self._new_spike(step, loss)
        self._seen.history = [*self._seen.history, loss][-max(HISTORY, self._window) :]
        if not self._window:
            return spike
        self._follow(step, loss, documents)
        return spike or self._new_rise(step)

    def end(self) -> None:
        """Judges a loss that is far up at the last step as if it had stayed so, if it has been for longer than a spike.

        Raises:
          Diverged: see `see`.
        """
        if self._window and self._seen.up >= min(self._window, ENOUGH):
            self._judge(self._seen.history[-min(self._seen.up, self._window) :])

    def _new_spike(self, step: int, loss: float) -> str | None:
        seen = self._seen
        known = seen.history[-HISTORY:]
        if len(known) < ENOUGH:
            return None
        usual = statistics.median(known)
        deviation = 1.4826 * statistics.median(abs(before - usual) for before in known)
        spiking = loss > usual + max(DEVIATIONS * deviation, LEAST_RISE * usual)
        begins = spiking and not seen.spiking and not seen.up
        seen.spiking = spiking
        return f"loss spike at step {step}: {loss:.3f}, usually {usual:.3f}" if begins else None

    def _new_rise(self, step: int) -> str | None:
        seen, recent = self._seen, self._seen.history[-self._window :]
        if len(recent) < self._window:
            return None
        mean = statistics.fmean(recent)
        seen.best = min(seen.best, mean)
        sure = RISEN_DEVIATIONS * _noise(recent) * math.sqrt(2 / len(recent))
        risen = mean > seen.best + max(RISEN * seen.best, LEAST_NATS, sure)
        begins = risen and not seen.risen and not seen.up
        # Told again only once it has been halfway down.
        seen.risen = risen or (seen.risen and mean > (1 + RISEN / 2) * seen.best)
        return f"the loss has risen: {mean:.3f} over {len(recent)} steps, at best {seen.best:.3f}" if begins else None

    def _follow(self, step: int, loss: float, documents: Sequence[str]) -> None:
        """Counts the steps that the loss is far up, and judges it once they are enough."""
        seen = self._seen
        seen.first = loss if seen.first is None else seen.first
        if not seen.up and loss > seen.limit:
            seen.began, seen.documents = step, list(documents)
        if seen.up or loss > seen.limit:
            seen.up += 1
        if seen.up <= self._window:
            sources = collections.Counter(name.partition("/")[0] for name in documents if "/" in name)
            seen.steps = [*seen.steps, (loss, dict(sources))][-(self._window + seen.up) :]
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
            limit = _far_above(mean, noise, count)
            if limit < seen.limit:
                seen.level, seen.limit = mean, limit
        # However noisy: a loss that has diverged is.
        usual = max(self._guess, seen.first)
        seen.limit = min(seen.limit, (1 + FAR) * usual, usual + MOST_NATS)

    def _judge(self, recent: list[float]) -> None:
        """Stops the run, unless the loss is on its way back or the data is other data, whose loss is its own."""
        seen = self._seen
        middle = len(recent) // 2
        before, after = statistics.median(recent[:middle]), statistics.median(recent[middle:])
        if after < (1 - WAY_BACK) * before:
            return
        most = max(LEARNT * self._guess, min(seen.first, self._guess))
        if after > most or not self._data_raised(after):
            raise Diverged(seen.began, seen.up, seen.level, after, seen.documents)
        print(
            f"the loss has been up since step {seen.began}, {after:.3f} where it was {seen.level:.3f}; the data "
            "changed, so this is taken for its usual",
            flush=True,
        )
        seen.up = 0
        seen.limit = sys.float_info.max  # until this window sets it, in the same step

    def _data_raised(self, loss: float) -> bool:
        """Whether a rise to `loss` came with a change of the data: with it, or by what the new data had at first."""
        losses, sources = zip(*self._seen.steps, strict=True)
        began = len(losses) - min(self._seen.up, self._window)
        names = sorted(set().union(*sources))
        counts = np.array([[step.get(name, 0) for name in names] for step in sources])
        odds = _change_odds(counts)
        change = int(np.argmax(odds)) + 1
        if not _other_data(counts[:change].sum(axis=0), counts[change:].sum(axis=0)):
            return False
        near = round(NEAR * self._window)
        if odds[max(began - near - 1, 0) : began + near].max() > odds.max() - LIKELY:
            return True
        own = losses[change:began]
        return bool(own) and loss <= _far_above(statistics.fmean(own), _noise(own), len(own))


def _far_above(mean: float, noise: float, count: int) -> float:
    """Returns what is far above the mean of so many losses that have this noise."""
    least = min(FAR_NATS, max(FAR_TIMES * mean, LEAST_NATS))
    return mean + max(FAR * mean, least, FAR_DEVIATIONS * noise * math.sqrt(1 + 1 / count))


def _noise(losses: list[float]) -> float:
    """Returns the standard deviation of losses about a level that may move, by how one differs from the next."""
    steps = [(after - before) ** 2 for before, after in itertools.pairwise(losses)]
    return math.sqrt(statistics.fmean(steps) / 2) if steps else 0.0


def _change_odds(counts: np.ndarray) -> np.ndarray:
    """Returns how likely it is, as a log, that the sources' shares changed before each step but the first.

    Args:
      counts: documents of each step and source, int [steps, sources].
    """
    before = counts.cumsum(axis=0)[:-1]
    parts = (before, counts.sum(axis=0) - before)
    return sum(_xlogx(part).sum(axis=1) - _xlogx(part.sum(axis=1)) for part in parts)


def _xlogx(x: np.ndarray) -> np.ndarray:
    """Returns x log x, zero at zero; scipy's takes a fifth of a second of every start to import."""
    return x * np.log(np.maximum(x, 1))


def _other_data(before: np.ndarray, since: np.ndarray) -> bool:
    """Whether the documents of each source, before and since, show other shares of the sources.

    Their distance is the share of documents that come from other sources (total variation). Few documents of many
    sources are far apart by chance alone, up to having nothing in common; so what as many documents differ by that are
    drawn from the shares of all together is taken off, as Cohen's kappa does.
    """
    sizes = [part.sum() for part in (before, since)]
    if not all(sizes):
        return False
    draw, together = np.random.default_rng(0).multinomial, (before + since) / sum(sizes)
    drawn = [draw(size, together, DRAWS) / size for size in sizes]
    chance = np.quantile(np.abs(drawn[0] - drawn[1]).sum(axis=1) / 2, SURE)
    distance = np.abs(before / sizes[0] - since / sizes[1]).sum() / 2
    return bool(distance > chance + OTHER_DATA * (1 - chance))
