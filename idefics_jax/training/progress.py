"""What a run says about itself: one line an interval, the same numbers to the writer, and an end when they go bad."""

import collections
import functools
import itertools
import statistics
import time
from typing import Any

import jax
import numpy as np
from clu import metrics as clu_metrics
from etils import epath

from idefics_jax import processes
from idefics_jax.training.divergence import Halted, LossWatch
from idefics_jax.training.step import RUNNING
from idefics_jax.training.suspects import keep, named

AVERAGED = ("loss", "accuracy", "grad_norm", "update_norm", "token_fill", "patch_fill", "attention_share")


class Progress:
    """Collects the metrics of each step without waiting for them, and reads them once an interval."""

    def __init__(
        self,
        steps: int,
        diverged_after: int,
        state: dict[str, Any] | None,
        *,
        vocabulary: int,
        leads: bool,
        workdir: epath.Path | None,
    ):
        """Starts, or goes on with what `state` returned when the run was stopped.

        Args:
          steps: the last step.
          diverged_after, vocabulary: see divergence.LossWatch.
          state: from a checkpoint, or None.
          leads: whether this process tells the others of its documents (run.RowShare): all of them see all, and come
            to the same judgement.
          workdir: where to keep the documents of steps that something went wrong with, or None.
        """
        self._steps = steps
        self._leads = leads
        self._workdir = workdir
        self._watch = LossWatch(diverged_after, state["watch"] if state else None, vocabulary=vocabulary)
        self._watched = 0  # how many of `_metrics` the watch has seen
        # Metrics of the steps since the last report before the run was stopped.
        self._before: list[dict[str, float]] = state["interval"] if state else []
        self._metrics: list[dict[str, jax.Array]] = []
        self._documents: list[tuple[str, ...]] = []  # of this process, of the steps that the watch has not seen
        self._named: set[str] = set()  # reasons of rejection that an example was printed of
        self._data_wait = 0.0
        self._since = time.monotonic()

    def add(self, metrics: dict[str, jax.Array], documents: tuple[str, ...], data_wait: float) -> None:
        """Takes a step's metrics (still being computed), the documents of its batch, and seconds spent waiting."""
        self._metrics.append(metrics)
        self._documents.append(documents)
        self._data_wait += data_wait

    def interval(self) -> list[dict[str, float]]:
        """Waits for the metrics of the steps since the last report, looks them over and returns them.

        Raises:
          Stopped: a step was not finite and may not be skipped, or the loss has diverged.
        """
        known = jax.device_get(self._metrics)
        told = processes.from_all(self._documents if self._leads else [() for _ in self._documents])
        self._documents = []
        for metrics, parts in zip(known[self._watched :], zip(*told, strict=True), strict=True):
            documents = tuple(itertools.chain.from_iterable(parts))
            step, loss = int(metrics["step"]), float(metrics["loss"])
            if int(metrics["halted_at"]) != RUNNING:
                raise Halted(int(metrics["halted_at"]), loss, float(metrics["grad_norm"]), documents)
            if metrics["skipped"]:
                wrong = f"step {step} is not finite and was skipped"
            else:
                wrong = self._watch.see(step, loss, documents)
                wrong = wrong and f"{wrong} ({_told_norms(metrics)})"
            if wrong:
                self._tell(step, wrong, documents)
        self._watched = len(known)
        return self._before + [{name: float(value) for name, value in metrics.items()} for metrics in known]

    def _tell(self, step: int, what: str, documents: tuple[str, ...]) -> None:
        where = f" (all in {keep(self._workdir, step, what, documents)})" if self._workdir else ""
        print(f"{what}; its documents: {named(documents)}{where}", flush=True)

    def state(self) -> dict[str, Any]:
        """Waits for the interval's metrics, and returns what a resumed run needs of this one, as plain JSON.

        Raises:
          Stopped: see `interval`.
        """
        return {"interval": self.interval(), "watch": self._watch.state()}

    def end(self) -> None:
        """Judges how the run ends, once `interval` has seen its last step; raises Stopped: see LossWatch.end."""
        self._watch.end()

    @property
    def sound(self) -> int | None:
        """The last number of steps from before the loss rose far, while it is up, as `interval` last saw it."""
        return self._watch.sound

    def report(
        self,
        step: int,
        learning_rate: float,
        rejected: dict[str, int],
        examples: dict[str, str],
        epochs: dict[str, float],
    ) -> dict[str, float]:
        """Waits for the interval's metrics, prints a line and returns the scalars to write.

        Args:
          step: the last one done.
          learning_rate: of that step.
          rejected: documents that this process has rejected so far, by reason.
          examples: the name of one document for each of these reasons; printed when the reason first comes up.
          epochs: how often this process has read each source's own part through.

        Raises:
          Stopped: see `interval`.
        """
        interval = self.interval()
        rejected, examples, epochs = self._of_all(rejected, examples, epochs)
        means = averages([metrics for metrics in interval if not metrics["skipped"]] or interval)
        now = time.monotonic()
        seconds = now - self._since
        fresh = interval[len(self._before) :]
        speed = {
            "perf/steps_per_second": len(self._metrics) / seconds,
            "perf/tokens_per_second": sum(m["tokens"] for m in fresh) / seconds,
            "perf/images_per_second": sum(m["images"] for m in fresh) / seconds,
            "perf/data_wait": self._data_wait / seconds,
        }
        # By this interval's pace: the first one also compiled.
        left = (self._steps - step) * seconds / len(self._metrics)
        print(self._line(step, means, speed, left, sum(rejected.values())), flush=True)
        for reason in sorted(rejected.keys() - self._named):
            print(f"rejected as {reason}: {rejected[reason]} so far, among them {examples[reason]}", flush=True)
        self._named |= rejected.keys()
        self._before = []
        self._metrics.clear()
        self._watched = 0
        self._data_wait, self._since = 0.0, now
        scalars = {f"train/{name}": value for name, value in means.items()}
        scalars["train/skipped"] = sum(metrics["skipped"] for metrics in interval)
        bad = {f"data/rejected/{reason}": float(count) for reason, count in rejected.items()}
        read = {f"data/epochs/{name}": count for name, count in epochs.items()}
        return {**scalars, "train/learning_rate": learning_rate, **speed, **bad, **read}

    def _of_all(
        self, rejected: dict[str, int], examples: dict[str, str], epochs: dict[str, float]
    ) -> tuple[dict[str, int], dict[str, str], dict[str, float]]:
        """Returns the same of all processes together."""
        told = [said for said in processes.from_all([rejected, examples, epochs] if self._leads else None) if said]
        counts: collections.Counter[str] = collections.Counter()
        found: dict[str, str] = {}
        for theirs, named_there, _ in told:
            counts.update(theirs)
            found = {**named_there, **found}
        return dict(counts), found, {name: statistics.fmean(said[2][name] for said in told) for name in epochs}

    def _line(self, step: int, means: dict[str, Any], speed: dict[str, float], left: float, rejected: int) -> str:
        minutes, seconds = divmod(round(left), 60)
        return (
            f"step {step}/{self._steps}  loss {means['loss']:.6f}  accuracy {means['accuracy']:.3f}  "
            f"gradient {means['grad_norm']:.3g}  "
            f"{speed['perf/tokens_per_second']:,.0f} tokens/s  {speed['perf/images_per_second']:,.0f} images/s  "
            f"fill {means['token_fill']:.2f} tokens {means['patch_fill']:.2f} patches  {minutes}:{seconds:02d} left"
            + (f"  {rejected} documents rejected" if rejected else "")
        )


def _told_norms(metrics: dict[str, Any]) -> str:
    """Returns a step's norms of gradient and update by part of the model, in words."""
    told = {}
    for kind in ("grad_norm", "update_norm"):
        parts = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(f"{kind}/")}
        told[kind] = ", ".join(f"{part} {float(value):.2g}" for part, value in sorted(parts.items()))
    return f"gradient norms: {told['grad_norm']}; update norms: {told['update_norm']}"


def averages(interval: list[dict[str, float]]) -> dict[str, float]:
    """Returns the means over some steps of the metrics that have one, the norms of each part among them."""
    names = tuple(name for name in interval[0] if name in AVERAGED or name.startswith(("grad_norm/", "update_norm/")))
    collection = _averages_of(names)
    # All steps of a metric at once: one by one they take a tenth of a second a report.
    steps = {_field(name): np.asarray([step[name] for step in interval], np.float32) for name in names}
    means = collection.single_from_model_output(**steps).compute()
    return {name: float(means[_field(name)]) for name in names}


@functools.cache
def _averages_of(names: tuple[str, ...]) -> type[clu_metrics.Collection]:
    fields = {_field(name): clu_metrics.Average.from_output(_field(name)) for name in names}
    return clu_metrics.Collection.create(**fields)


def _field(name: str) -> str:
    """Returns a name that clu can make a dataclass field of: without slashes."""
    return name.replace("/", "__")
