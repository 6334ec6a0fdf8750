"""The line of progress, and what it says of rejected documents."""

from idefics_jax.training.progress import Progress
from idefics_jax.training.step import RUNNING


def metrics(step: int) -> dict[str, float]:
    shares = {"accuracy": 0.5, "grad_norm": 1.0, "update_norm": 0.1, "token_fill": 0.9, "patch_fill": 0.8}
    return {"step": step, "loss": 2.0, "halted_at": RUNNING, "skipped": 0, "tokens": 10, "images": 1, **shares}


def test_each_reason_of_rejection_is_shown_once_with_an_example(capsys):
    progress = Progress(steps=3, diverged_after=0, state=None, vocabulary=400, leads=True, workdir=None)
    bad = [{"empty": 2}, {"empty": 3}, {"empty": 3, "bomb": 1}]
    for step, rejected in enumerate(bad, start=1):
        progress.add(metrics(step), ("s/a:0",), 0.0)
        scalars = progress.report(step, 1e-3, rejected, {reason: f"s/a:{reason}" for reason in rejected}, {"s": 0.5})
        assert scalars["data/epochs/s"] == 0.5
        assert {name: scalars[f"data/rejected/{name}"] for name in rejected} == rejected
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("rejected")] == [
        "rejected as empty: 2 so far, among them s/a:empty",
        "rejected as bomb: 1 so far, among them s/a:bomb",
    ]
    assert [line.split("  ")[-1] for line in lines if line.startswith("step")] == [
        f"{sum(counts.values())} documents rejected" for counts in bad
    ]
