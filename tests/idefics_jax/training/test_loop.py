"""A run: stopping and going on changes not one bit, bad numbers and wrong settings are sentences."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from data_pipelines import pipeline
from idefics_jax import commands
from idefics_jax.convert.__main__ import main as convert
from idefics_jax.convert.orbax import load_model
from idefics_jax.errors import UserError
from idefics_jax.param_transforms import paths
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.initial import from_sections
from idefics_jax.training.loop import RUN_FILE, check_same_run, record_run, train
from idefics_jax.training.run import make_model, micro_batches
from tests.idefics_jax.training.small_run import config_file

LEARNT = ("train/loss", "train/accuracy", "train/grad_norm", "train/token_fill", "train/patch_fill")


def run(values, workdir):
    workdir = epath.Path(workdir)
    train(TrainConfig.from_config_dict(values), values, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", *LEARNT)} for line in lines], load_model(workdir / "model")[0]


@pytest.fixture(scope="module")
def unbroken_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("unbroken")


@pytest.fixture(scope="module")
def unbroken(small_values, unbroken_folder):
    return run(small_values, unbroken_folder)


def test_sigterm_saves_and_going_on_is_bit_equal_to_never_having_stopped(values, unbroken, tmp_path):
    """The run is stopped between two checkpoints and in the middle of what the packer holds."""
    command = [sys.executable, "-m", "idefics_jax.train", "--config", str(config_file(values, tmp_path))]
    command += ["--workdir", str(tmp_path / "run")]
    environment = {**os.environ, "IDEFICS_STOPPED_STATUS": "75"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
    assert process.returncode == 75, errors
    stopped_at = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert 2 <= stopped_at < 8
    lines, params = run(values, tmp_path / "run")
    assert lines == unbroken[0]
    for path, leaf in paths.flatten(params).items():
        np.testing.assert_array_equal(leaf, paths.flatten(unbroken[1])[path], err_msg=path)


def test_two_runs_with_one_seed_are_equal_and_let_go_of_a_batch_before_they_wait_for_the_next(
    values, unbroken, tmp_path, monkeypatch
):
    make, taken = pipeline.batches, []

    def watched(*args, **kinds):
        data = make(*args, **kinds)

        class Watched(type(data)):
            def __next__(self):
                assert [batch() for batch in taken] == [None] * len(taken)
                packed = super().__next__()
                taken.append(weakref.ref(packed))
                return packed

        data.__class__ = Watched
        return data

    monkeypatch.setattr(pipeline, "batches", watched)
    lines, params = run(values, tmp_path)
    assert len(taken) == values["steps"]
    assert lines == unbroken[0]
    jax.tree.map(np.testing.assert_array_equal, params, unbroken[1])


def test_a_finished_run_run_again_changes_nothing(values, unbroken, unbroken_folder, tmp_path):
    shutil.copytree(unbroken_folder, tmp_path / "run")
    lines, params = run(values, tmp_path / "run")
    assert lines == unbroken[0]
    jax.tree.map(np.testing.assert_array_equal, params, unbroken[1])


def test_a_run_that_ends_with_its_loss_far_up_is_not_finished(values, unbroken, unbroken_folder, tmp_path):
    shutil.copytree(unbroken_folder, tmp_path / "run")
    for name in ("model", "summary.json"):
        (shutil.rmtree if name == "model" else os.remove)(tmp_path / "run" / name)
    meta = tmp_path / "run" / "checkpoints" / "8" / "meta" / "metadata"
    saved = json.loads(meta.read_text())
    # As after more steps than this run has.
    saved["progress"]["watch"] |= {"up": 30, "began": 6, "level": 2.0, "limit": 3.0, "history": [9.0] * 30}
    saved["progress"]["watch"]["steps"] = [(2.0, {"pairs": 4})] * 5 + [(9.0, {"pairs": 4})] * 30
    meta.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"diverged: it rose at step 6 .*good checkpoint is .*/4 \(remove .* 8, to"):
        run(values, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_a_loss_that_is_not_finite_names_step_documents_and_checkpoint(values, tmp_path):
    values["optimizer"]["learning_rate"] = 1e12
    values["optimizer"]["warmup_steps"] = 0
    values["checkpoint_every"] = 1
    with pytest.raises(
        UserError, match=r"not finite at step \d .*its documents: \w+/\w+\.parquet:\d+.*last good checkpoint is .*/1;"
    ) as error:
        run(values, tmp_path)
    (kept,) = (tmp_path / "suspects").iterdir()
    told = json.loads(kept.read_text())
    assert told["what"].startswith(f"the loss or its gradient is not finite at step {told['step']} ")
    assert ", ".join(told["documents"][:8]) in str(error.value)


@pytest.mark.parametrize("adaptation", ["lora", "frozen"])
def test_variants_start_from_a_model_and_keep_what_is_frozen(values, adaptation, unbroken, unbroken_folder, tmp_path):
    values |= {"init_from": str(unbroken_folder), "model": {}, "init_std": (), "steps": 2}
    adapters = ((".*/lora_.*", "trainable", 1.0, 0.0),) if adaptation == "lora" else ()
    values["partition"] = (*adapters, ("connector/.*", "trainable", 1.0, 0.1), (".*", "frozen"))
    if adaptation == "lora":
        values["lora"] = {"text": {"pattern": "text_model/layers/.*", "rank": 2, "alpha": 4.0}}
    _, params = run(values, tmp_path / adaptation)
    before, after = paths.flatten(unbroken[1]), paths.flatten(params)
    moved = {path for path in after if not np.array_equal(before[path], after[path])}
    assert {path for path in moved if path.startswith("connector/")}
    adapted = {path for path in after if path.startswith("text_model/layers/") and path.endswith("kernel")}
    assert {path for path in moved if not path.startswith("connector/")} == (adapted if adaptation == "lora" else set())
    if adaptation == "lora":
        written = (tmp_path / adaptation / part for part in ("adapter/adapter_config.json", "summary.json"))
        adapter_at, summary_at = (file.stat().st_mtime_ns for file in written)
        assert adapter_at < summary_at, "who finds a summary finds the rest"
        assert_adapter_alone_gives_the_model(tmp_path / adaptation, unbroken_folder, tmp_path, after)


def assert_adapter_alone_gives_the_model(workdir, base, folder, wanted):
    """The run's adapter, exported and merged into the model it started from, is the run's model."""
    assert convert(["to-peft", str(workdir), str(folder / "peft")]) == 0
    assert convert(["from-peft", str(folder / "peft"), str(base), str(folder / "back")]) == 0
    back = paths.flatten(load_model(folder / "back")[0])
    for path, leaf in wanted.items():
        np.testing.assert_allclose(back[path], leaf, atol=1e-6, err_msg=path)
    assert convert(["to-peft", str(base), str(folder / "none")]) == 2, "a run without lora has no adapter"


def test_another_config_in_the_same_folder_is_refused_with_the_keys(tmp_path):
    workdir = epath.Path(tmp_path)
    old = {"steps": 10, "log_every": 5, "remat": "full", "optimizer": {"learning_rate": 1e-3}, "data": {"prefetch": 4}}
    check_same_run(old, workdir)
    record_run(old, workdir)
    check_same_run({**old, "steps": 1}, workdir)
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    check_same_run({**old, "log_every": 1, "remat": "linear", "mesh": {"data": 8}, "data": {"prefetch": 1}}, workdir)
    with pytest.raises(UserError, match=r"other settings \(optimizer.learning_rate: 0.001 -> 0.1; steps: 10 -> 20\)"):
        check_same_run({**old, "steps": 20, "optimizer": {"learning_rate": 0.1}}, workdir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be one of float32, bfloat16"),
        ({"remat": "some"}, "remat is 'some'"),
        ({"init_from": "x", "init_std": ()}, "x is not a folder"),
        ({"init_from": "x"}, "init_std is of random weights"),
        ({"model": {}}, "give model .* init_from .* or both"),
        ({"rows_a_device": 0}, "rows_a_device is 0; it must be at least 1"),
        ({"partition": (("nothing", "frozen"), (".*", "trainable", 1.0, 0.0))}, "'nothing' matches no parameter"),
        ({"partition": ((".*", "frozen"),)}, "nothing would train"),
        ({"processor": "/nowhere"}, "/nowhere"),
        ({"mesh": {"rows": 2}}, "mesh axis 'rows' is unknown"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run({**values, **change}, tmp_path)
    assert not (tmp_path / RUN_FILE).exists(), "a refused start leaves the folder free for the corrected command"


def test_a_start_refused_at_the_first_batch_leaves_the_folder_free_for_the_corrected_command(values, tmp_path):
    right = values["data"]["shape"]["patches"]
    values["data"]["shape"]["patches"] = 3
    with pytest.raises(UserError, match="data.shape.patches"):
        run(values, tmp_path)
    assert (tmp_path / RUN_FILE).exists()
    values["data"]["shape"]["patches"] = right
    check_same_run(values, epath.Path(tmp_path))


def test_a_work_directory_that_is_a_file_is_refused(values, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; give a folder"):
        run(values, tmp_path / "file")


def test_a_model_that_does_not_fit_the_processor_is_refused(values, tmp_path):
    values["model"]["text_config"]["vocab_size"] = 402
    with pytest.raises(UserError, match="text_config.vocab_size is 402 and must be 403"):
        run(values, tmp_path)


def test_usage_errors_exit_with_2_and_one_line(values, tmp_path):
    good = str(config_file(values, tmp_path))
    workdir = ["--workdir", str(tmp_path / "run")]
    wrong = {
        "there is no file 'configs/digit.py'; nearest is configs/digits.py": ["--config", "configs/digit.py", *workdir],
        "configs/digits.py:foo is none of full, lora": ["--config", "configs/digits.py:foo", *workdir],
        'Did you mean "optimizer"': ["--config", good, *workdir, "--config.optimizr.b1=0.5"],
        "config.optimizer.learning_rate is nan": ["--config", good, *workdir, "--config.optimizer.learning_rate=nan"],
        "optimizer.learning_rate is -1.0": ["--config", good, *workdir, "--config.optimizer.learning_rate=-1"],
        "argument 'stray' belongs to no flag": ["--config", good, *workdir, "stray"],
        "--workdir=: it is empty; give a folder": ["--config", good, "--workdir="],
        "--workdir is missing": ["--config", good],
        "Did you mean: workdir": ["--config", good, "--wrkdir=x"],
        "invalid literal": ["--config", good, *workdir, "--config.steps=abc"],
    }
    running = {
        message: subprocess.Popen(
            [sys.executable, "-m", "idefics_jax.train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ},
        )
        for message, arguments in wrong.items()
    }
    for message, process in running.items():
        _, errors = process.communicate()
        assert process.returncode == commands.USAGE_ERROR, errors
        assert message in errors
        assert "Traceback" not in errors
        assert len(errors.strip().splitlines()) == 1, errors
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_in_the_data_of_another_is_resumed_without_it(values, unbroken, unbroken_folder, tmp_path):
    """Else it could not be resumed, or would be resumed elsewhere, once the other is deleted or trained further."""
    shutil.copytree(unbroken_folder, tmp_path / "first")
    values["data"]["after"] = str(tmp_path / "first")
    whole = run(values, tmp_path / "second")
    assert whole[0] != unbroken[0]
    for gone in ("first", "second/checkpoints/8", "second/model"):
        shutil.rmtree(tmp_path / gone)
    assert run(values, tmp_path / "second")[0] == whole[0]


def test_the_model_that_trains_is_as_the_settings_say(small_values):
    said = {"dtype": "bfloat16", "remat": "full", "vision_remat": "linear", "neftune_alpha": 5.0}
    config = TrainConfig.from_config_dict({**small_values, **said})
    model = make_model(config, from_sections(config, image_token_id=1))
    assert {name: getattr(model, name) for name in said} == {**said, "dtype": jnp.bfloat16}


@pytest.mark.parametrize(("rows", "most", "parts"), [(16, 1, 16), (16, 4, 4), (16, 64, 1), (12, 5, 3), (7, 2, 7)])
def test_a_device_takes_its_rows_in_the_fewest_equal_parts_that_are_small_enough(rows, most, parts):
    assert micro_batches(rows, most) == parts
