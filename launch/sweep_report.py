"""A finished comparison as a table and as a picture: means and spread over the seeds of each arm."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen before anything draws)

# Figure of a run's summary: heading, number format.
COLUMNS = {
    "trained_parameters": ("trained parameters", "{:,.0f}"),
    "step_seconds": ("step, s", "{:.3f}"),
    "host_memory_gib": ("host memory, GiB", "{:.2f}"),
    "device_memory_gib": ("device memory, GiB", "{:.2f}"),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run gave: its score, and the figures of its summary.json."""

    arm: str
    seed: int
    score: float
    summary: dict[str, float]


def by_arm(results: Sequence[Result], arms: Sequence[str]) -> dict[str, list[Result]]:
    """Returns the results of each arm that has any, in the order of `arms`."""
    grouped = {arm: [result for result in results if result.arm == arm] for arm in arms}
    return {arm: found for arm, found in grouped.items() if found}


def table(results: Sequence[Result], arms: Sequence[str], metric: str) -> str:
    """Returns a Markdown table: score as mean, lowest and highest; other figures as medians over the seeds."""
    known = [name for name in COLUMNS if all(name in result.summary for result in results)]
    lines = [
        ["arm", "seeds", f"{metric}, mean", "lowest - highest", *(COLUMNS[name][0] for name in known)],
        ["---"] * (4 + len(known)),
    ]
    for arm, found in by_arm(results, arms).items():
        scores = [result.score for result in found]
        medians = [COLUMNS[name][1].format(statistics.median(r.summary[name] for r in found)) for name in known]
        spread = f"{min(scores):.3f} - {max(scores):.3f}"
        lines.append([arm, str(len(found)), f"{statistics.mean(scores):.3f}", spread, *medians])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(folder: Path, results: Sequence[Result], arms: Sequence[str], metric: str) -> Path:
    """Draws every run's score and each arm's mean beside what the arm costs, into `folder/sweep.png`."""
    grouped = by_arm(results, arms)
    costs = ("trained_parameters", "step_seconds", "host_memory_gib")
    figure, (scores, *panels) = plt.subplots(1, 1 + len(costs), figsize=(13, 3.4), layout="constrained")
    for index, found in enumerate(grouped.values()):
        values = [result.score for result in found]
        scores.plot([index] * len(values), values, "o", color="tab:blue", alpha=0.5)
        scores.plot([index - 0.25, index + 0.25], [statistics.mean(values)] * 2, color="black")
    scores.set(title=f"{metric}: every seed, and the mean")
    for panel, name in zip(panels, costs, strict=True):
        panel.bar(
            range(len(grouped)), [statistics.median(r.summary[name] for r in found) for found in grouped.values()]
        )
        panel.set(title=COLUMNS[name][0])
    for axis in (scores, *panels):
        axis.set_xticks(range(len(grouped)), list(grouped))
        axis.grid(axis="y", alpha=0.3)
    path = folder / "sweep.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
