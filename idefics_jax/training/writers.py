"""clu's metric writers without TensorFlow.

`import clu.metric_writers` imports TensorFlow for one of its writers (clu 0.0.12, its last release). An empty module
takes that writer's place before the package is imported; ours, of the same interface, writes with tensorboardX.
tensorboardX in turn imports torch and Google's client where they are installed, for what is not used here; it is kept
from both, which take as long as all of the rest.
"""

import contextlib
import json
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from idefics_jax.buckets import Outbox

_summary_writer = types.ModuleType("clu.metric_writers.summary_writer")
_summary_writer.SummaryWriter = None
sys.modules.setdefault("clu.metric_writers.summary_writer", _summary_writer)

from clu import metric_writers  # noqa: E402  (only importable after the line above)


@contextlib.contextmanager
def _as_if_not_installed(*names: str) -> Iterator[None]:
    """Makes the import of modules fail inside, but for those that have been imported already."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _as_if_not_installed("torch", "google.cloud.storage"):
    import tensorboardX


class TensorBoardWriter(metric_writers.MetricWriter):
    """Writes a TensorBoard event file in `logdir`; steps after `resume_step` in older files are superseded."""

    def __init__(self, logdir: epath.PathLike, resume_step: int):
        self._writer = tensorboardX.SummaryWriter(str(logdir), purge_step=resume_step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Images are uint8 or float [n, h, w, c]."""
        for name, image in images.items():
            self._writer.add_images(name, np.asarray(image), step, dataformats="NHWC")

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray], num_buckets=None) -> None:
        for name, array in arrays.items():
            self._writer.add_histogram(name, np.asarray(array), step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._writer.add_text("hparams", f"```\n{json.dumps(dict(hparams), indent=1, default=str)}\n```")

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Any = None) -> None:
        raise TypeError(f"summaries of TensorFlow plugins are not written: {', '.join(values)}")

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        raise TypeError(f"audio is not written: {', '.join(audios)}")

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        raise TypeError(f"video is not written: {', '.join(videos)}")

    def write_pointcloud(self, step: int, point_clouds: Mapping[str, Any], **_: Any) -> None:
        raise TypeError(f"point clouds are not written: {', '.join(point_clouds)}")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def silent_writer() -> metric_writers.MetricWriter:
    """Returns a writer that writes nothing, for processes whose metrics another one writes."""
    return metric_writers.MultiWriter([])


class RunWriter(TensorBoardWriter):
    """Also keeps the scalars as one JSON object a step in `workdir/metrics.jsonl`, which can be searched and plotted.

    A resumed run drops the lines after the step it resumes from, so the file reads as if it had never stopped. Where
    `workdir` is in a bucket, both grow on this machine and are delivered with `flush`, at the end and now and then.
    """

    def __init__(self, workdir: epath.Path, resume_step: int):
        self._outbox = Outbox(workdir)
        super().__init__(self._outbox.path / "events", resume_step)
        kept = [line for line in read_metrics(workdir / "metrics.jsonl") if line["step"] <= resume_step]
        path = self._outbox.path / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  (closed in close)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        super().write_scalars(step, scalars)
        self._file.write(json.dumps({"step": step, **{name: float(value) for name, value in scalars.items()}}) + "\n")
        self._outbox.deliver_now_and_then()

    def flush(self) -> None:
        super().flush()
        self._outbox.deliver()

    def close(self) -> None:
        self._file.close()
        super().close()
        self._outbox.close()


def read_metrics(path: epath.Path) -> list[dict[str, float]]:
    """Reads a metrics.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
