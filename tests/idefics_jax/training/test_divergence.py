"""A run that goes wrong says so: spikes are named once, changed data is not divergence, divergence stops the run."""

import json

import numpy as np
import pytest
from etils import epath

from idefics_jax.errors import UserError
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.divergence import Diverged, Halted, LossWatch
from idefics_jax.training.loop import train
from idefics_jax.training.progress import Progress

NOISE = np.random.default_rng(0).normal(size=2000)


def falling(steps, start=6.0, end=2.0):
    """A loss curve as training gives it: a fast fall, then slower, with noise of three per cent."""
    time = np.arange(steps) / steps
    return (end + (start - end) * np.exp(-6 * time)) * (1 + 0.03 * NOISE[:steps])


def follow(watch, losses, first=0):
    for step, loss in enumerate(losses, first):
        watch.see(step, float(loss), [f"doc {step}"])


def test_an_ordinary_loss_gives_no_word(capsys):
    follow(LossWatch(50, None), falling(1000))
    assert capsys.readouterr().out == ""


def test_a_spike_is_named_once_with_its_documents(capsys):
    losses = falling(400)
    losses[200:205] = 5.0
    follow(LossWatch(50, None), losses)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("loss spike at step 200: 5.000, usually 2.")
    assert line.endswith("its documents: doc 200")


@pytest.mark.parametrize("rise", [0.0, 0.1])
def test_a_loss_that_stays_far_up_has_diverged(rise):
    losses = np.concatenate([falling(300), 9.5 + rise * np.arange(60)])
    with pytest.raises(Diverged, match=r"it rose at step 300 from 2\.\d+ .* its documents: doc 300") as error:
        follow(LossWatch(50, None), losses)
    assert error.value.step == 300


def test_other_data_with_a_higher_loss_is_not_divergence(capsys):
    easy, hard = falling(300, end=0.3), falling(300, start=4.0)
    follow(LossWatch(50, None), np.concatenate([easy, hard]))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_loss_on_its_way_back_has_not_diverged():
    follow(LossWatch(50, None), np.concatenate([falling(300), np.linspace(14, 9.2, 50), falling(100)]))


def test_without_a_limit_nothing_is_stopped():
    follow(LossWatch(0, None), np.concatenate([falling(300), np.full(600, 50.0)]))


def test_going_on_from_a_saved_state_judges_as_if_never_stopped(capsys):
    losses = np.concatenate([falling(300), np.full(60, 9.5)])
    watch = LossWatch(50, None)
    follow(watch, losses[:330])
    resumed = LossWatch(50, json.loads(json.dumps(watch.state())))
    capsys.readouterr()
    with pytest.raises(Diverged, match="it rose at step 300"):
        follow(resumed, losses[330:], first=330)
    assert capsys.readouterr().out == "", "the spike was told before"


def metrics(step, loss, *, halted_at=-1, skipped=False):
    return {"step": np.int32(step), "loss": np.float32(loss), "halted_at": np.int32(halted_at), "skipped": skipped}


def test_an_interval_with_a_step_that_is_not_finite_is_never_handed_to_a_checkpoint():
    progress = Progress(10, 0, None)
    progress.add(metrics(2, 2.0), ("a",), 0.0)
    assert [step["loss"] for step in progress.state()["interval"]] == [2.0]
    progress.add(metrics(3, "nan", halted_at=3), ("b",), 0.0)
    with pytest.raises(Halted, match="not finite at step 3 .*its documents: b"):
        progress.state()


def test_a_skipped_step_is_named_once_and_stays_out_of_the_watch(capsys):
    progress = Progress(10, 0, None)
    progress.add(metrics(3, "nan", skipped=True), ("bad/0", "bad/1"), 0.0)
    for _ in range(2):
        assert progress.state()["watch"]["start"] == []
    assert capsys.readouterr().out == "step 3 is not finite and was skipped; its documents: bad/0, bad/1\n"


def test_a_run_with_a_learning_rate_that_diverges_is_stopped_and_names_the_checkpoint_before(values, tmp_path):
    values |= {"steps": 150, "log_every": 10, "checkpoint_every": 10, "keep_checkpoints": 50, "diverged_after": 20}
    values["optimizer"] |= {"learning_rate": 30.0, "schedule": "constant", "warmup_steps": 100}
    with pytest.raises(UserError) as error:
        train(TrainConfig.from_config_dict(values), values, epath.Path(tmp_path))
    message = str(error.value)
    assert "the loss has diverged: it rose at step " in message, message
    step = int(message.split("it rose at step ")[1].split()[0])
    good = int(message.split("last good checkpoint is ")[1].split()[0].rstrip(";").rpartition("/")[2])
    assert step - 10 < good <= step
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for part in ("vision_model", "connector", "text_model"):
        assert lines[-1][f"train/grad_norm/{part}"] > 0
        assert lines[-1][f"train/update_norm/{part}"] > 0
