"""The curves of a run as a picture, from its metrics.jsonl."""

import io

import matplotlib

matplotlib.use("Agg")

from etils import epath  # noqa: E402  (the backend is chosen before anything draws)
from matplotlib import pyplot as plt  # noqa: E402

from idefics_jax.training.writers import read_metrics  # noqa: E402

PANELS = (
    ("train/loss", "loss, nats a token"),
    ("train/accuracy", "share of tokens right"),
    ("train/grad_norm", "gradient norm"),
)


def draw_curves(workdir: epath.Path) -> epath.Path:
    """Draws loss, accuracy and gradient norm by step into `workdir/loss.png`, and returns its path."""
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3.6), layout="constrained")
    for axis, (name, label) in zip(axes, PANELS, strict=True):
        axis.plot([line["step"] for line in lines], [line[name] for line in lines], linewidth=1)
        axis.set(xlabel="step", title=label)
        axis.set_yscale("linear" if name == "train/accuracy" else "log")
        axis.grid(alpha=0.3)
    path = workdir / "loss.png"
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png")
    plt.close(figure)
    path.write_bytes(image.getvalue())
    return path
