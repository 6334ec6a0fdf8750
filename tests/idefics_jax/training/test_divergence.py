"""A run that goes wrong says so: spikes are named once, changed data is not divergence, divergence stops the run."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from etils import epath

from idefics_jax.errors import UserError
from idefics_jax.training.checkpoint import Checkpoints
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.divergence import Diverged, Halted, LossWatch
from idefics_jax.training.loop import stopped_message, train
from idefics_jax.training.progress import Progress

NOISE = np.random.default_rng(0).normal(size=2000)
VOCABULARY = 1000  # one who guesses has a loss of 6.9


def falling(steps, start=6.0, end=2.0):
    """A loss curve as training gives it: a fast fall, then slower, with noise of three per cent."""
    time = np.arange(steps) / steps
    return (end + (start - end) * np.exp(-6 * time)) * (1 + 0.03 * NOISE[:steps])


def follow(watch, losses, first=0, source="web"):
    """Returns what the watch tells of spikes."""
    seen = enumerate(losses, first)
    return [told for step, loss in seen if (told := watch.see(step, float(loss), [f"{source}/file:{step}"]))]


def test_an_ordinary_loss_gives_no_word(capsys):
    assert follow(LossWatch(50, None, vocabulary=VOCABULARY), falling(1000)) == []
    assert capsys.readouterr().out == ""


def test_a_spike_is_told_once():
    losses = falling(400)
    losses[200:205] = 5.0
    (told,) = follow(LossWatch(50, None, vocabulary=VOCABULARY), losses)
    assert told.startswith("loss spike at step 200: 5.000, usually 2.")


@pytest.mark.parametrize(
    ("losses", "rises"),
    [
        pytest.param(np.r_[np.full(300, 5.0), np.full(400, 7.3)], 1, id="by-nearly-half"),
        pytest.param(np.r_[np.full(300, 1.0), np.linspace(1.0, 1.4, 400), np.full(300, 1.4)], 1, id="slowly"),
        pytest.param(np.r_[np.full(300, 1.0), np.linspace(1.0, 1.1, 400), np.full(300, 1.1)], 0, id="by-a-tenth"),
        pytest.param(np.r_[np.full(300, 1.0), np.tile(np.r_[np.full(150, 1.3), np.full(150, 1.0)], 2)], 2, id="twice"),
    ],
)
def test_a_rise_too_small_to_stop_for_is_told(losses, rises):
    losses = losses * (1 + 0.02 * NOISE[: len(losses)])
    told = follow(LossWatch(50, None, vocabulary=VOCABULARY), losses)
    assert sum(line.startswith("the loss has risen: ") for line in told) == rises


def test_the_documents_of_a_step_gone_wrong_are_named_and_all_of_them_kept(tmp_path, capsys):
    documents = tuple(f"web/file:{i}" for i in range(20))
    progress = Progress(100, 0, None, vocabulary=400, leads=True, workdir=epath.Path(tmp_path))
    for step in range(30):
        progress.add(metrics(step, 9.0 if step == 25 else 2.0), documents if step == 25 else (), 0.0)
    progress.interval()
    (line,) = capsys.readouterr().out.splitlines()
    first, kept = ", ".join(documents[:8]), tmp_path / "suspects" / "step_25.json"
    norms = "connector 0.25, text_model 0.25"
    what = f"loss spike at step 25: 9.000, usually 2.000 (gradient norms: {norms}; update norms: {norms})"
    assert line == f"{what}; its documents: {first} and 12 more (all in {kept})"
    assert json.loads(kept.read_text()) == {"step": 25, "what": what, "documents": list(documents)}


@pytest.mark.parametrize("rise", [0.0, 0.1])
def test_a_loss_that_stays_far_up_has_diverged(rise):
    losses = np.concatenate([falling(300), 9.5 + rise * np.arange(60)])
    with pytest.raises(Diverged, match=r"it rose at step 300 from 2\.\d+ .* its documents: web/file:300") as error:
        follow(LossWatch(50, None, vocabulary=VOCABULARY), losses)
    assert error.value.step == 300


NOISY_TWO = 2 + 0.05 * NOISE[:200]


@pytest.mark.parametrize(
    ("losses", "began"),
    [
        pytest.param(np.concatenate([falling(500, end=0.3), np.full(150, 6.2)]), 500, id="back-to-chance"),
        pytest.param(np.concatenate([NOISY_TWO, 2 * 1.005 ** np.arange(1400)]), 284, id="half-a-percent-a-step"),
        pytest.param(np.concatenate([[6.2, 6.5, 8, 12, 20, 30, 45], 60 + NOISE[:80]]), 4, id="before-it-has-learnt"),
        pytest.param(np.concatenate([NOISY_TWO, np.tile(np.linspace(40, 38, 50), 20)]), 200, id="falls-in-each-window"),
        pytest.param(np.r_[7.0, np.linspace(7, 12, 200), np.full(60, 12.0)], 82, id="worse-than-a-guess"),
        pytest.param(np.concatenate([falling(300), 7 * np.exp(0.5 * NOISE[:150])]), 300, id="noisy"),
        pytest.param(np.r_[np.full(200, 0.15), np.full(60, 0.6)] * (1 + 0.15 * NOISE[:260]), 200, id="small"),
        pytest.param(np.r_[2.0, np.full(60, 3.5)], 1, id="from-the-first-loss-of-a-trained-model"),
        pytest.param(np.r_[2.0, 2.1, 1.9, np.full(60, 3.5)] * (1 + 0.1 * NOISE[:63]), 3, id="at-once-and-noisy"),
        pytest.param(
            np.r_[np.linspace(2, 3.5, 30), 3.5 + 0.1 * NOISE[:60]], 20, id="in-the-warm-up-of-a-trained-model"
        ),
    ],
)
def test_what_was_learnt_and_lost_is_not_forgotten(losses, began):
    with pytest.raises(Diverged) as error:
        follow(LossWatch(50, None, vocabulary=VOCABULARY), losses)
    assert abs(error.value.step - began) <= 5


@pytest.mark.parametrize("window", [50, 100])
@pytest.mark.parametrize(
    "losses",
    [
        pytest.param(np.concatenate([np.linspace(6.2, 9, 60), np.linspace(9, 5, 60), falling(800, 5)]), id="warm-up"),
        pytest.param(np.concatenate([np.linspace(40, 6, 100), falling(500)]), id="large-at-the-start"),
        pytest.param(falling(2000) * np.exp(0.5 * NOISE), id="small-batches"),
        pytest.param(np.where(NOISE > 0, 3.0, 0.1), id="easy-and-hard-batches"),
        pytest.param(0.05 * np.exp(0.7 * NOISE), id="nearly-nothing-left-to-learn"),
        pytest.param(np.r_[0.02 + 0.005 * NOISE[:500], 0.1 + 0.02 * NOISE[500:]], id="a-tenth-of-a-nat"),
        pytest.param(np.r_[1.0, 2 * np.exp(0.3 * NOISE)], id="an-easy-batch-first"),
        pytest.param(np.concatenate([falling(300), np.linspace(14, 9.2, 50), falling(100)]), id="on-its-way-back"),
    ],
)
def test_what_only_looks_bad_is_not_divergence(losses, window):
    follow(LossWatch(window, None, vocabulary=VOCABULARY), losses)


def test_other_sources_with_a_higher_loss_are_not_divergence_and_are_what_is_judged_by_from_then_on(capsys):
    watch = LossWatch(50, None, vocabulary=VOCABULARY)
    follow(watch, falling(300, end=0.3), source="easy")
    follow(watch, falling(300, start=4.0), first=300, source="hard")
    assert "since step 300, 2.0" in capsys.readouterr().out
    with pytest.raises(Diverged, match=r"rose at step 600 from (1\.9|2\.0)\d+ and after 50 steps it is 9.000"):
        follow(watch, np.full(60, 9.0), first=600, source="hard")


@pytest.mark.parametrize(("hard_before", "hard_after", "stops"), [(1, 9, False), (1, 2, True)])
def test_other_shares_of_the_same_sources_count_as_other_data(hard_before, hard_after, stops):
    watch = LossWatch(50, None, vocabulary=VOCABULARY)
    for step in range(400):
        hard = hard_before if step < 200 else hard_after
        documents = ["hard/file:1"] * hard + ["easy/file:1"] * (10 - hard)
        if stops and step == 249:
            with pytest.raises(Diverged):
                watch.see(step, 2.5, documents)
            return
        watch.see(step, 0.4 if step < 200 else 2.5, documents)


@pytest.mark.parametrize(
    ("rises", "to", "first", "stops"),
    [
        pytest.param(300, 3.0, 2.0, False, id="with-the-data"),
        pytest.param(302, 3.0, 2.0, False, id="within-a-few-steps"),
        pytest.param(290, 3.0, 2.0, True, id="before-the-data"),
        pytest.param(320, 3.0, 2.0, True, id="after-healthy-steps-on-it"),
        pytest.param(300, 5.0, 2.0, True, id="higher-than-a-trained-model-gets"),
        pytest.param(300, 5.0, 6.9, False, id="to-less-than-it-began-with"),
        pytest.param(300, 7.2, 8.0, True, id="above-a-guess"),
    ],
)
def test_only_what_other_data_can_do_is_put_down_to_it(rises, to, first, stops):
    losses = np.r_[np.linspace(first, 0.5, 50), np.full(rises - 50, 0.5), np.full(100, to)] * (
        1 + 0.03 * NOISE[: rises + 100]
    )
    watch = LossWatch(50, None, vocabulary=VOCABULARY)
    follow(watch, losses[:300], source="easy")
    if stops:
        with pytest.raises(Diverged, match=f"it rose at step {rises} "):
            follow(watch, losses[300:], first=300, source="hard")
    else:
        follow(watch, losses[300:], first=300, source="hard")


def test_data_that_is_at_first_little_harder_and_soon_much_is_what_raised_the_loss():
    losses = np.r_[np.full(300, 1.0), np.full(15, 1.4), np.full(100, 1.8)] * (1 + 0.03 * NOISE[:415])
    watch = LossWatch(50, None, vocabulary=VOCABULARY)
    follow(watch, losses[:300], source="easy")
    follow(watch, losses[300:], first=300, source="hard")


@pytest.mark.parametrize(("documents", "window"), [(1, 20), (2, 20), (1, 50)])
def test_chance_does_not_make_few_documents_of_many_sources_other_data(documents, window):
    random = np.random.default_rng(0)
    names = random.choice(50, p=random.dirichlet(np.full(50, 2.0)), size=(400, documents))

    def see(source):
        watch = LossWatch(window, None, vocabulary=VOCABULARY)
        for step, numbers in enumerate(names):
            name = source if step >= 300 else "set"
            watch.see(step, 1.5 if step < 300 else 3.2, [f"{name}{number}/0" for number in numbers])

    with pytest.raises(Diverged, match="it rose at step 300"):
        see("set")
    see("new")


def test_without_a_limit_nothing_is_stopped():
    follow(LossWatch(0, None, vocabulary=VOCABULARY), np.concatenate([falling(300), np.full(600, 50.0)]))


def test_going_on_from_a_saved_state_judges_as_if_never_stopped():
    losses = np.concatenate([falling(300), np.full(60, 9.5)])
    watch = LossWatch(50, None, vocabulary=VOCABULARY)
    follow(watch, losses[:330])
    resumed = LossWatch(50, json.loads(json.dumps(watch.state())), vocabulary=VOCABULARY)
    assert follow(resumed, losses[330:339], first=330) == [], "the spike was told before"
    with pytest.raises(Diverged, match="it rose at step 300"):
        follow(resumed, losses[339:], first=339)


def metrics(step, loss, *, halted_at=-1, skipped=False):
    made = {"step": np.int32(step), "loss": np.float32(loss), "halted_at": np.int32(halted_at), "skipped": skipped}
    made |= {f"{name}_norm/{part}": 0.25 for name in ("grad", "update") for part in ("connector", "text_model")}
    return {**made, "grad_norm": np.float32(loss)}


def test_an_interval_with_a_step_that_is_not_finite_is_never_handed_to_a_checkpoint():
    progress = Progress(10, 0, None, vocabulary=400, leads=True, workdir=None)
    progress.add(metrics(2, 2.0), ("a",), 0.0)
    assert [step["loss"] for step in progress.state()["interval"]] == [2.0]
    progress.add(metrics(3, "nan", halted_at=3), ("b",), 0.0)
    with pytest.raises(Halted, match="not finite at step 3 .*its documents: b"):
        progress.state()


def test_an_update_that_overflows_is_not_put_down_to_the_loss():
    progress = Progress(10, 0, None, vocabulary=400, leads=True, workdir=None)
    progress.add(metrics(3, 2.0, halted_at=3), ("b",), 0.0)
    with pytest.raises(
        Halted, match=r"the update of the parameters is not finite at step 3, its loss \(2.0\) and grad"
    ):
        progress.state()


def test_a_skipped_step_is_named_once_and_stays_out_of_the_watch(capsys):
    progress = Progress(10, 0, None, vocabulary=400, leads=True, workdir=None)
    progress.add(metrics(3, "nan", skipped=True), ("bad/0", "bad/1"), 0.0)
    for _ in range(2):
        assert progress.state()["watch"]["history"] == []
    assert capsys.readouterr().out == "step 3 is not finite and was skipped; its documents: bad/0, bad/1\n"


def test_a_watch_that_other_code_saved_is_told_as_that():
    state = LossWatch(8, None, vocabulary=VOCABULARY).state()
    with pytest.raises(UserError, match=r"saved by other code, .* \(usual_sources\); go on with that code"):
        LossWatch(8, {**state, "usual_sources": {}}, vocabulary=VOCABULARY)


def test_a_run_with_a_learning_rate_that_diverges_is_stopped_and_its_last_good_checkpoint_is_there(values, tmp_path):
    """Checkpoints come so often that those kept were all written while the loss was already up."""
    values |= {"steps": 20, "log_every": 2, "checkpoint_every": 2, "keep_checkpoints": 2, "diverged_after": 8}
    values["optimizer"] |= {"learning_rate": 3.0, "schedule": "constant", "warmup_steps": 12}
    with pytest.raises(UserError) as error:
        train(TrainConfig.from_config_dict(values), values, epath.Path(tmp_path))
    message = str(error.value)
    assert "the loss has diverged: it rose at step " in message, message
    step = int(message.split("it rose at step ")[1].split()[0])
    good = epath.Path(message.split("last good checkpoint is ")[1].split()[0])
    assert step - 2 <= int(good.name) < step
    left = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert left[0] == int(good.name)
    assert f"remove those after it, {left[1]}, {left[2]}, to go on" in message
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for part in ("vision_model", "connector", "text_model"):
        assert lines[0][f"train/grad_norm/{part}"] > 0
        assert lines[0][f"train/update_norm/{part}"] > 0
    for step in left[1:]:
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    values["optimizer"]["learning_rate"], values["checkpoint_every"] = 1e-3, 20
    assert train(TrainConfig.from_config_dict(values), values, epath.Path(tmp_path))
    values["optimizer"]["learning_rate"] = 1e-4
    with pytest.raises(UserError, match="other settings"):
        train(TrainConfig.from_config_dict(values), values, epath.Path(tmp_path))


# Of the tests' small run.
AT_A_RATE_OF_3 = [5.9, 5.1, 4.6, 6.7, 6.9, 11.4, 9.5, 10.2, 27.0, 15.7, 14.1, 20.0, 27.1, 34.6, 25.3, 31.1, 22.2, 56.1]
AT_A_RATE_OF_3 += [33.2, 52.1, 48.1, 31.6, 44.5, 43.6, 54.3, 29.3, 42.8, 51.4, 25.9, 36.3, 44.3, 50.7, 45.1, 40.0, 44.8]


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        pytest.param(np.r_[6.2, 10, 30, np.full(57, 45.0)] + 0.1 * NOISE[:60], "rose at step [123] ", id="short-run"),
        pytest.param(np.r_[falling(205), np.full(95, 11.0)], "rose at step 205 ", id="near-the-end"),
        pytest.param(AT_A_RATE_OF_3, "rose at step 5 ", id="noisier-than-it-was-low"),
        pytest.param(np.r_[falling(205), np.full(10, 11.0)], None, id="a-spike-at-the-end"),
        pytest.param(falling(300), None, id="an-ordinary-loss"),
        pytest.param(np.r_[falling(205), np.geomspace(11, 2, 95)], None, id="on-its-way-back"),
    ],
)
def test_a_loss_that_is_up_when_the_run_ends_is_said(losses, says):
    watch = LossWatch(100, None, vocabulary=500)
    follow(watch, losses)
    with pytest.raises(Diverged, match=says) if says else contextlib.nullcontext():
        watch.end()
    never = LossWatch(0, watch.state(), vocabulary=500)
    never.end()


def test_other_data_may_end_a_run_with_a_higher_loss():
    watch = LossWatch(100, None, vocabulary=VOCABULARY)
    follow(watch, NOISY_TWO)
    follow(watch, NOISY_TWO[:60] + 1.3, first=200, source="other")
    watch.end()


def test_without_a_checkpoint_from_before_the_message_says_so(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path), keep=2)
    stopped = Diverged(8, 40, 6.0, 60.0, ["web/file:8"])
    assert "no checkpoint is from before it: start again;" in str(stopped_message(stopped, checkpoints))
    for step in (8, 16):
        (checkpoints.path / str(step)).mkdir()
    message = str(stopped_message(stopped, checkpoints))
    assert "no checkpoint is from before it (8, 16 are from after it): start again;" in message
    checkpoints.close()
