"""The finished runs of a sweep as a table and as a picture: means and spread over the repetitions of each arm."""

import dataclasses
import io
import json
import statistics
from collections.abc import Sequence

from etils import epath

from idefics_jax.errors import UserError
from idefics_jax.training.summary import SUMMARY_FILE
from idefics_jax.training.writers import read_metrics
from launch.sweep_runs import Sweep

# Figure of a run's summary: heading, number format.
COLUMNS = {
    "trained_parameters": ("trained parameters", "{:,.0f}"),
    "step_seconds": ("step, s", "{:.3f}"),
    "host_memory_gib": ("host memory, GiB", "{:.2f}"),
    "device_memory_gib": ("device memory, GiB", "{:.2f}"),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run gave: its number and arm, its score, and the figures of its summary.json."""

    number: int
    arm: str
    score: float
    summary: dict[str, float]


def is_done(sweep: Sweep, number: int) -> bool:
    """Whether a run has left what the table needs: its summary, and its evaluation or else its metrics."""
    folder = epath.Path(sweep.folder(number))
    return (folder / SUMMARY_FILE).exists() and _figures(sweep, folder).exists()


def _figures(sweep: Sweep, folder: epath.Path) -> epath.Path:
    return folder / "eval" / "metrics.json" if sweep.config.evaluate else folder / "metrics.jsonl"


def collect(sweep: Sweep) -> list[Result]:
    """Returns the results of the runs that are done."""
    results = []
    for number, run in enumerate(sweep.config.runs):
        if not is_done(sweep, number):
            continue
        folder = epath.Path(sweep.folder(number))
        figures = _figures(sweep, folder)
        known = json.loads(figures.read_text()) if sweep.config.evaluate else read_metrics(figures)[-1]
        if sweep.config.metric not in known:
            raise UserError(f"sweep.metric is {sweep.config.metric!r}; run {number} has {', '.join(sorted(known))}")
        summary = json.loads((folder / SUMMARY_FILE).read_text())
        results.append(Result(number, run.arm, known[sweep.config.metric], summary))
    return results


def write(folder: epath.Path, results: Sequence[Result], metric: str) -> str:
    """Writes table.md, results.jsonl and sweep.png into `folder`, and returns the table."""
    text = table(results, metric)
    (folder / "table.md").write_text(text)
    lines = [json.dumps(dataclasses.asdict(result)) + "\n" for result in results]
    (folder / "results.jsonl").write_text("".join(lines))
    (folder / "sweep.png").write_bytes(draw(results, metric))
    return text


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Returns the results of each arm, in the order of their numbers."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.arm, []).append(result)
    return grouped


def table(results: Sequence[Result], metric: str) -> str:
    """Returns a Markdown table: score as mean, lowest and highest; other figures as medians over the repetitions."""
    known = [name for name in COLUMNS if all(name in result.summary for result in results)]
    lines = [
        ["arm", "runs", f"{metric}, mean", "lowest - highest", *(COLUMNS[name][0] for name in known)],
        ["---"] * (4 + len(known)),
    ]
    for arm, found in by_arm(results).items():
        scores = [result.score for result in found]
        medians = [COLUMNS[name][1].format(statistics.median(r.summary[name] for r in found)) for name in known]
        spread = f"{min(scores):.3f} - {max(scores):.3f}"
        lines.append([arm, str(len(found)), f"{statistics.mean(scores):.3f}", spread, *medians])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(results: Sequence[Result], metric: str) -> bytes:
    """Draws every run's score and each arm's mean beside what the arm costs; returns a PNG."""
    from matplotlib.figure import Figure  # here, as it would be a quarter of what every start takes to import

    grouped = by_arm(results)
    costs = ("trained_parameters", "step_seconds", "host_memory_gib")
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    scores, *panels = figure.subplots(1, 1 + len(costs))
    for index, found in enumerate(grouped.values()):
        values = [result.score for result in found]
        scores.plot([index] * len(values), values, "o", color="tab:blue", alpha=0.5)
        scores.plot([index - 0.25, index + 0.25], [statistics.mean(values)] * 2, color="black")
    scores.set(title=f"{metric}: every run, and the mean")
    for panel, name in zip(panels, costs, strict=True):
        panel.bar(
            range(len(grouped)), [statistics.median(r.summary[name] for r in found) for found in grouped.values()]
        )
        panel.set(title=COLUMNS[name][0])
    for axis in (scores, *panels):
        axis.set_xticks(range(len(grouped)), list(grouped), rotation=0 if max(map(len, grouped)) < 12 else 20)
        axis.grid(axis="y", alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png")
    return image.getvalue()
