"""A sweep runs every arm on every seed, names what failed, and goes on where it stopped."""

import json
import subprocess
import sys

import pytest

from configs import digits as digits_config
from data_pipelines import digits
from launch.sweep_report import Result, draw, table

COUNTS = {"pairs": 20, "interleaved": 2, "conversations": 2, "numbers": 40, "warmup": 2, "heldout": 4}
FILE = """
from ml_collections import ConfigDict

def get_config(arm=""):
    if not arm:
        return ConfigDict({sweep!r})
    config = ConfigDict({train!r})
    if arm == "broken":
        config.optimizer.learning_rate = -1.0
    return config
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
def command(tmp_path_factory):
    """A sweep of an arm that trains two steps and one whose settings are impossible."""
    folder = tmp_path_factory.mktemp("sweep")
    digits.build(folder / "data", seed=0, counts=COUNTS)
    train = digits_config.get_config().to_dict()
    train |= {"processor": str(folder / "data" / "processor"), "steps": 2, "log_every": 1, "checkpoint_every": 2}
    source = {"kind": "cauldron", "image_root": None, "weight": 1.0}
    numbers = {**source, "paths": (str(folder / "data" / "numbers.parquet"),)}
    train["data"]["stages"] = {"stage1": {"sources": {"numbers": numbers}, "documents": None}}
    train["optimizer"]["warmup_steps"] = 0
    (folder / "eval.py").write_text(EVALUATION.format(heldout=str(folder / "data" / "heldout.parquet")))
    sweep = {
        "workdir": str(folder / "runs"),
        "data": (),
        "pretrain": "",
        "arms": ("whole", "broken"),
        "seeds": (7,),
        "evaluate": str(folder / "eval.py"),
        "metric": "exact_match",
    }
    (folder / "arms.py").write_text(FILE.format(sweep=sweep, train=train))
    return folder, [sys.executable, "-m", "launch.sweep", "--config", str(folder / "arms.py")]


def test_a_sweep_keeps_what_worked_names_what_failed_and_does_not_run_twice(command):
    folder, arguments = command
    first = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert first.returncode == 2, first.stderr
    assert "1 of 2 runs failed: broken-7" in first.stderr
    assert "optimizer.learning_rate is -1.0" in first.stdout
    (line,) = (folder / "runs" / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert (result["arm"], result["seed"]) == ("whole", 7)
    trained = json.loads((folder / "runs" / "whole-7" / "run.json").read_text())
    assert (trained["seed"], trained["data"]["seed"]) == (7, 7)
    assert result["summary"]["trained_parameters"] == result["summary"]["parameters"] > 10_000
    assert 0.1 < result["summary"]["host_memory_gib"] < 16
    assert (folder / "runs" / "sweep.png").stat().st_size > 10_000

    second = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert second.stdout.count("$ python -m idefics_jax.train") == 1, "only what failed is tried again"
    assert (folder / "runs" / "results.jsonl").read_text().splitlines() == [line]


def result(arm, seed, score, **summary):
    return Result(arm, seed, score, {"trained_parameters": 1234, "step_seconds": 0.5, "host_memory_gib": 1.5} | summary)


def test_the_table_has_mean_and_spread_of_each_arm_in_its_order(tmp_path):
    results = [
        result("full", 0, 0.5),
        result("lora", 0, 0.25),
        result("lora", 1, 0.75, step_seconds=1.5),
    ]
    lines = table(results, ("lora", "dora", "full"), "exact_match").splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        *("lora", "2", "0.500", "0.250 - 0.750", "1,234", "1.000", "1.50")
    ]
    assert lines[3].startswith("| full | 1 | 0.500 |")
    assert len(lines) == 4
    assert draw(tmp_path, results, ("lora", "dora", "full"), "exact_match").stat().st_size > 10_000
