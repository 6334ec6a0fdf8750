"""The curves of a run as a picture, from its metrics.jsonl."""

import io

from etils import epath

from idefics_jax.training.writers import read_metrics

PANELS = (
    ("train/loss", "loss, nats a token"),
    ("train/accuracy", "share of tokens right"),
    ("train/grad_norm", "gradient norm"),
)


def draw_curves(workdir: epath.Path) -> epath.Path:
    """Draws loss, accuracy and gradient norm by step into `workdir/loss.png`, and returns its path."""
    from matplotlib.figure import Figure  # here, as it would be a quarter of what every start takes to import

    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line]
    figure = Figure(figsize=(13, 3.6))
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.14, top=0.9, wspace=0.2)
    for axis, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        axis.plot([line["step"] for line in lines], [line[name] for line in lines], linewidth=1)
        axis.set(xlabel="step", title=label)
        axis.set_yscale("linear" if name == "train/accuracy" else "log")
        axis.grid(alpha=0.3)
    path = workdir / "loss.png"
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png")
    path.write_bytes(image.getvalue())
    return path
