"""Signs that a run goes wrong: steps that are not finite, spikes of the loss, and a loss that has left for good.

The host sees them in the metrics that it fetches anyway, a few steps late. The paper (section 3.2) saw training with
everything unfrozen diverge; a run should say so by itself, and name the last checkpoint from before.
"""

import collections
import statistics
from collections.abc import Sequence
from typing import Any

from idefics_jax.errors import UserError

# Losses that "usual" is the median of, and how many must be known before anything is judged.
HISTORY, ENOUGH = 100, 20
# A spike is this many robust standard deviations above the usual loss, and this share of it.
DEVIATIONS, LEAST_RISE = 6.0, 0.1
# Diverged: this much above both the usual loss and the loss at the start, and not on its way back.
DIVERGED_RISE = 1.5


class Stopped(UserError):
    """A run that must not go on; `step` is the first that is in doubt."""

    def __init__(self, step: int, what: str, documents: Sequence[str]):
        self.step = step
        self.documents = tuple(documents)
        super().__init__(f"{what}; its documents: {named(documents)}")


class Halted(Stopped):
    """A step whose numbers are not finite; the parameters are those before it."""

    def __init__(self, step: int, loss: float, documents: Sequence[str]):
        super().__init__(step, f"the loss or its gradient is not finite at step {step} (loss {loss})", documents)


class Diverged(Stopped):
    """A loss that rose and stayed."""

    def __init__(self, step: int, losses: Sequence[float], usual: float, documents: Sequence[str]):
        what = (
            f"the loss has diverged: it rose at step {step} from {usual:.3f} and after {len(losses)} steps it is "
            f"{statistics.median(losses[-ENOUGH:]):.3f}"
        )
        super().__init__(step, what, documents)


def named(documents: Sequence[str]) -> str:
    """Returns the first documents of a batch by name, and how many more there are."""
    more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
    return ", ".join(documents[:8]) + more


class LossWatch:
    """Follows the loss of a run, step by step; its state is plain JSON and goes into checkpoints."""

    def __init__(self, diverged_after: int, state: dict[str, Any] | None):
        """Starts, or goes on from the `state` of another.

        Args:
          diverged_after: steps that a loss must stay up before the run is stopped; 0 never stops it.
          state: what `state()` returned, or None.
        """
        state = state or {"start": [], "history": [], "risen": [], "began": -1, "documents": []}
        self._diverged_after = diverged_after
        self._start: list[float] = list(state["start"])
        self._history = collections.deque(state["history"], HISTORY)
        # The losses since a spike began, the step it began at and that step's documents.
        self._risen: list[float] = list(state["risen"])
        self._began: int = state["began"]
        self._documents: list[str] = list(state["documents"])

    def state(self) -> dict[str, Any]:
        """Returns what another needs to go on."""
        return {
            "start": self._start,
            "history": list(self._history),
            "risen": self._risen,
            "began": self._began,
            "documents": self._documents,
        }

    def see(self, step: int, loss: float, documents: Sequence[str]) -> None:
        """Takes a step's finite loss; prints a line when a spike begins.

        Raises:
          Diverged: the loss has stayed up for `diverged_after` steps and is not on its way back.
        """
        if len(self._start) < ENOUGH:
            self._start.append(loss)
        if len(self._history) < ENOUGH:
            self._history.append(loss)
            return
        usual = statistics.median(self._history)
        deviation = 1.4826 * statistics.median(abs(known - usual) for known in self._history)
        if loss <= usual + max(DEVIATIONS * deviation, LEAST_RISE * usual):
            self._history.append(loss)
            self._risen = []
            return
        if not self._risen:
            self._began, self._documents = step, list(documents)
            print(
                f"loss spike at step {step}: {loss:.3f}, usually {usual:.3f}; its documents: {named(documents)}",
                flush=True,
            )
        self._risen.append(loss)
        if self._diverged_after and len(self._risen) == self._diverged_after:
            self._judge(usual)

    def _judge(self, usual: float) -> None:
        """Stops the run, or takes the risen loss for the usual one: data that changed is not divergence."""
        middle = len(self._risen) // 2
        before, after = statistics.median(self._risen[: middle or 1]), statistics.median(self._risen[middle:])
        start = statistics.median(self._start)
        if after > DIVERGED_RISE * max(usual, start) and after >= 0.98 * before:
            raise Diverged(self._began, self._risen, usual, self._documents)
        self._history = collections.deque(self._risen, HISTORY)
        self._risen = []
