"""A sweep's runs are numbered and checked first; what failed is named, and the same command goes on with it."""

import contextlib
import json
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from configs import digits as digits_config
from data_pipelines import digits
from idefics_jax.errors import UserError
from launch import sweep_runs
from launch.devices import Devices
from launch.finished import is_trained
from launch.sweep_report import Result, collect, draw, table
from tests.launch import jobset

COUNTS = {"pairs": 20, "interleaved": 2, "conversations": 2, "numbers": 40, "warmup": 2, "heldout": 4}
FILE = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

def get_config(arm=""):
    config = ConfigDict({train!r})
    config.init_from = placeholder(str)
    if arm == "torn":
        config.init_from, config.init_std = {torn!r}, ()
    if arm == "lost":
        config.processor = "nowhere"
    if arm in ("adapted", "misspelt"):
        config.model, config.init_std = {{}}, ()
        config.partition = ((".*/norm/scale" if arm == "adapted" else "nrom", "trainable", 1.0, 0.0), (".*", "frozen"))
    return config

def sweep():
    return {sweep!r}
"""
EVALUATION = """
from configs.eval import digits

def get_config():
    config = digits.get_config()
    config.source.paths = ({heldout!r},)
    config.rows, config.max_new_tokens = 4, 2
    return config
"""


@pytest.fixture(scope="module")
def write_sweep(tmp_path_factory):
    """Returns a function that writes a config file of small runs and of a sweep over them, and its command."""
    folder = tmp_path_factory.mktemp("sweep")
    digits.build(folder / "data", seed=0, counts=COUNTS)
    train = digits_config.get_config().to_dict()
    train |= {"processor": str(folder / "data" / "processor"), "steps": 2, "log_every": 1, "checkpoint_every": 2}
    source = {"kind": "cauldron", "image_root": None, "weight": 1.0}
    numbers = {**source, "paths": (str(folder / "data" / "numbers.parquet"),)}
    train["data"]["stages"] = {"stage1": {"sources": {"numbers": numbers}, "documents": None}}
    # Less to compile, and to compute.
    train["optimizer"] |= {"name": "adamw", "warmup_steps": 0}
    train["data"]["shape"]["rows"] = 4
    for section in train["model"].values():
        section["hidden_size"] = 16
    (folder / "torn").mkdir()
    (folder / "torn" / "config.json").write_text(
        json.dumps({"model_type": "idefics2", "image_token_id": 401, **train["model"]})
    )
    (folder / "torn" / "model.safetensors").write_text("not safetensors")
    (folder / "eval.py").write_text(EVALUATION.format(heldout=str(folder / "data" / "heldout.parquet")))

    def write(name, sweep):
        path = folder / f"{name}.py"
        torn = str(folder / "torn")
        path.write_text(FILE.format(sweep={"workdir": str(folder / name), **sweep}, train=train, torn=torn))
        return folder / name, [sys.executable, "-m", "launch.sweep", "--config", str(path)]

    return write


def test_a_sweep_keeps_what_worked_names_what_failed_and_does_not_run_twice(write_sweep):
    runs = [
        {"argument": "torn"},
        {"argument": "whole", "settings": {"seed": 7, "data.seed": 7, "optimizer.learning_rate": 1e-3}},
    ]
    folder, _ = write_sweep("kept", {"runs": runs})
    evaluate = {"evaluate": str(folder.parent / "eval.py"), "metric": "exact_match"}
    _, arguments = write_sweep("kept", {"runs": runs, **evaluate})
    first = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert first.returncode == 2, first.stderr
    assert "1 of 2 runs failed: 000" in first.stderr
    assert "model.safetensors" in first.stdout
    (line,) = (folder / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert (result["number"], result["arm"]) == (1, "whole optimizer.learning_rate=0.001")
    trained = json.loads((folder / "001" / "run.json").read_text())
    assert (trained["seed"], trained["data"]["seed"], trained["optimizer"]["learning_rate"]) == (7, 7, 1e-3)
    assert result["summary"]["trained_parameters"] == result["summary"]["parameters"] > 10_000
    assert 0.1 < result["summary"]["host_memory_gib"] < 16
    assert (folder / "sweep.png").stat().st_size > 10_000

    # A run that has its figures is done, whether or not its model is kept.
    shutil.rmtree(folder / "001" / "model")
    assert is_trained(folder / "001", used=False)
    assert not is_trained(folder / "001", used=True)
    second = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert second.stdout.count("$ python -m idefics_jax.train") == 1, "only what failed is tried again"
    assert (folder / "results.jsonl").read_text().splitlines() == [line]

    # Without an evaluation the loss at the end is compared.
    _, arguments = write_sweep("kept", {"runs": runs})
    (again,) = collect(sweep_runs.read(arguments[-1], None))
    last = json.loads((folder / "001" / "metrics.jsonl").read_text().splitlines()[-1])
    assert again == Result(1, result["arm"], last["train/loss"], result["summary"])

    # The number has another run now than its folder.
    _, arguments = write_sweep("kept", {"runs": [runs[0], {"argument": "whole", "settings": {"seed": 8}}]})
    with pytest.raises(UserError, match="run 001: whole seed=8: .* holds a run with other settings"):
        sweep_runs.read(arguments[-1], None).check([1])


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"runs": [{"settings": {"optimizer.learning_rat": 1}}]}, "run 000: optimizer.learning_rat=1: .*learning_rat"),
        ({"runs": [{}, {"settings": {"optimizer.learning_rate": -1.0}}]}, "run 001: .*learning_rate is -1.0"),
        ({"runs": [{"setting": {}}]}, r"sweep.runs\[0\].setting is not a setting; did you mean 'settings'"),
        ({"runs": [{}], "seed": 3}, "sweep.seed is not a setting"),
        ({"runs": []}, "names no runs"),
        ({"runs": [{"settings": {"seed": 1}}, {}, {"settings": {"seed": 1}}]}, "runs 0 and 2 of .* are the same"),
    ],
)
def test_what_is_wrong_in_a_sweep_is_said_before_any_run(sweep, said, write_sweep):
    _, arguments = write_sweep("wrong", sweep)
    with pytest.raises(UserError, match=said):
        sweep_runs.read(arguments[-1], None).check(range(len(sweep["runs"])))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"argument": "adapted"}, None),
        ({"argument": "misspelt"}, "run 001: misspelt: .*'nrom' .*matches"),
        (
            {"argument": "adapted", "settings": {"processor": "nowhere"}},
            "run 001: adapted processor=nowhere: .*nowhere",
        ),
        ({"argument": "adapted", "settings": {"mesh.data": 3}}, "run 001: .*do not fit 1 device"),
    ],
)
def test_what_a_run_will_lack_is_said_before_what_all_start_from_is_trained(run, said, write_sweep):
    folder, arguments = write_sweep(
        "ahead", {"runs": [{"argument": "adapted", "settings": {"seed": 1}}, run], "pretrain": "first"}
    )
    sweep = sweep_runs.read(arguments[-1], None)
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        sweep.rehearse([0, 1], pretrains=True, here=Devices(count=1, slices=1))
    assert not folder.exists()


def test_a_number_that_is_no_run_is_refused(write_sweep):
    _, arguments = write_sweep("numbers", {"runs": [{}, {"settings": {"seed": 1}}]})
    read = sweep_runs.read(arguments[-1], "elsewhere/")
    assert read.chosen(["1", "0", "1"]) == [0, 1]
    assert read.folder(1) == "elsewhere/001"
    with pytest.raises(UserError, match="--runs has '2'; the runs are 0 to 1"):
        read.chosen(["0", "2"])


def dry_run(arguments, *more):
    done = subprocess.run([*arguments, "--dry-run", *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dry_run_prints_the_commands_and_runs_none(write_sweep):
    runs = [{"argument": "whole", "settings": {"init_std": ()}}]
    sweep = {"runs": runs, "data": ("a.module", "b c"), "pretrain": "first", "evaluate": "e.py"}
    folder, arguments = write_sweep("dry", sweep)
    file = f"{arguments[-1]}"
    assert [shlex.split(line, comments=True)[3:] for line in dry_run(arguments).splitlines()] == [
        ["b c"],
        ["--config", f"{file}:first", "--workdir", f"{folder}/first"],
        [],
        [
            *("--config", f"{file}:whole", "--workdir", f"{folder}/000"),
            *(f"--config.init_from={folder}/first", "--config.init_std=()"),
        ],
        ["--checkpoint", f"{folder}/000", "--config", "e.py"],
    ]
    assert not folder.exists()


def test_every_run_is_a_jobset_or_a_request_of_its_own(write_sweep):
    _, arguments = write_sweep("rented", {"runs": [{"settings": {"seed": seed}} for seed in (1, 2)]})
    rented = ["--workdir=gs://my-bucket/rates", "--name=rates", "--slice=v5e-16", "--image=i.pkg.dev/p/r/i:1"]
    jobsets = list(yaml.safe_load_all(dry_run(arguments, *rented, "--backend=jobset")))
    assert [content["metadata"]["name"] for content in jobsets] == ["rates-000", "rates-001"]
    for number, content in enumerate(jobsets):
        assert jobset.faults(content) == []
        (container,) = content["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        assert container["command"][7:] == [
            *("--config", arguments[-1], "--workdir", f"gs://my-bucket/rates/00{number}"),
            f"--config.seed={number + 1}",
        ]
    program = dry_run(arguments, *rented, "--backend=tpu-vm", "--zone=us-west4-a", "--runs=1")
    assert program.count("gcloud compute tpus queued-resources create") == 1
    assert "create rates-001 " in program


@pytest.mark.parametrize(
    ("sweep", "workdir", "said"),
    [
        ({}, None, "rented machines share no disk with this one, give gs://"),
        ({"pretrain": "first"}, "gs://b/c", "has steps before its runs"),
        ({"runs": [{"settings": {"quantize": ("nrom",)}}]}, "gs://b/c", "run 000: quantize=.*'nrom' .*matches"),
    ],
)
def test_what_rented_machines_cannot_do_is_refused(sweep, workdir, said, write_sweep):
    _, arguments = write_sweep("refused", {"runs": [{}], **sweep})
    with pytest.raises(UserError, match=said):
        sweep_runs.read(arguments[-1], workdir).check_rentable([0])


def result(number, arm, score, **summary):
    return Result(
        number, arm, score, {"trained_parameters": 1234, "step_seconds": 0.5, "host_memory_gib": 1.5} | summary
    )


def test_the_table_has_mean_and_spread_of_each_arm_in_the_order_of_its_runs():
    results = [result(0, "lora", 0.25), result(2, "full", 0.5), result(3, "lora", 0.75, step_seconds=1.5)]
    lines = table(results, "exact_match").splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        *("lora", "2", "0.500", "0.250 - 0.750", "1,234", "1.000", "1.50")
    ]
    assert lines[3].startswith("| full | 1 | 0.500 |")
    assert len(lines) == 4
    assert len(draw(results, "exact_match")) > 10_000
