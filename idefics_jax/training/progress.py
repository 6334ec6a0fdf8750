"""What a run says about itself: one line an interval, the same numbers to the writer, and an end when they go bad."""

import functools
import time
from typing import Any

import jax
from clu import metrics as clu_metrics

from idefics_jax.errors import UserError
from idefics_jax.training.step import RUNNING

AVERAGED = ("loss", "accuracy", "grad_norm", "update_norm", "token_fill", "patch_fill")
Interval = clu_metrics.Collection.create(**{name: clu_metrics.Average.from_output(name) for name in AVERAGED})


class Progress:
    """Collects the metrics of each step without waiting for them, and reads them once an interval."""

    def __init__(self, steps: int, interval: list[dict[str, float]]):
        """Takes the last step, and the metrics of the steps since the last report before the run was stopped."""
        self._steps = steps
        self._before = interval
        self._metrics: list[dict[str, jax.Array]] = []
        self._documents: list[tuple[str, ...]] = []
        self._data_wait = 0.0
        self._since = time.monotonic()

    def add(self, metrics: dict[str, jax.Array], documents: tuple[str, ...], data_wait: float) -> None:
        """Takes a step's metrics (still being computed), the documents of its batch, and seconds spent waiting."""
        self._metrics.append(metrics)
        self._documents.append(documents)
        self._data_wait += data_wait

    def interval(self) -> list[dict[str, float]]:
        """Waits for the metrics of the steps since the last report, and returns them.

        Raises:
          Halted: one of those steps had a loss or gradient that is not finite.
        """
        known = jax.device_get(self._metrics)
        for metrics, documents in zip(known, self._documents, strict=True):
            if int(metrics["halted_at"]) != RUNNING:
                raise Halted(int(metrics["halted_at"]), float(metrics["loss"]), documents)
        return self._before + [{name: float(value) for name, value in metrics.items()} for metrics in known]

    def report(self, step: int, learning_rate: float, rejected: dict[str, int]) -> dict[str, float]:
        """Waits for the interval's metrics, prints a line and returns the scalars to write.

        Raises:
          Halted: see `interval`.
        """
        interval = self.interval()
        parts = [Interval.single_from_model_output(**{name: m[name] for name in AVERAGED}) for m in interval]
        means = {name: float(value) for name, value in functools.reduce(Interval.merge, parts).compute().items()}
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
        self._before = []
        self._metrics.clear()
        self._documents.clear()
        self._data_wait, self._since = 0.0, now
        scalars = {f"train/{name}": value for name, value in means.items()}
        bad = {f"data/rejected/{reason}": float(count) for reason, count in rejected.items()}
        return {**scalars, "train/learning_rate": learning_rate, **speed, **bad}

    def _line(self, step: int, means: dict[str, Any], speed: dict[str, float], left: float, rejected: int) -> str:
        minutes, seconds = divmod(round(left), 60)
        return (
            f"step {step}/{self._steps}  loss {means['loss']:.6f}  accuracy {means['accuracy']:.3f}  "
            f"{speed['perf/tokens_per_second']:,.0f} tokens/s  {speed['perf/images_per_second']:,.0f} images/s  "
            f"fill {means['token_fill']:.2f} tokens {means['patch_fill']:.2f} patches  {minutes}:{seconds:02d} left"
            + (f"  {rejected} documents rejected" if rejected else "")
        )


class Halted(UserError):
    """A step whose numbers are not finite; the parameters are those before it."""

    def __init__(self, step: int, loss: float, documents: tuple[str, ...]):
        self.step = step
        self.documents = documents
        named = ", ".join(documents[:8]) + (f" and {len(documents) - 8} more" if len(documents) > 8 else "")
        super().__init__(f"the loss or its gradient is not finite at step {step} (loss {loss}); its documents: {named}")
