"""What runs under shard_map, the attention kernel and the loss, and generation: on devices as on one."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict:
    command = [sys.executable, "-m", "tests.idefics_jax.sharded_kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["attention", "loss"])
def test_results_and_gradients_are_those_of_one_device(name, found):
    assert found[name]["error"] <= 1e-5


def test_attention_sends_nothing(found):
    assert found["attention"]["sent in loops"] == found["attention"]["sent"] == []


def test_a_chunk_of_the_loss_sends_numbers_of_a_token_and_no_logits(found):
    """The head is gathered, and its gradient summed, outside the loop; logits [1, 8, 37] lie as [1, 8, 19]."""
    sent = " ".join(found["loss"]["sent in loops"])
    assert set(re.findall(r"all-\w+|collective-\w+|reduce-scatter", sent)) == {"all-reduce"}
    assert set(re.findall(r"\[[\d,]+\]", sent)) == {"[1,8]", "[1,8,8]"}  # 8 positions, and 8 numbers of each
    assert "all-gather" in found["loss"]["sent"]
    assert "f32[1,8,19]" in found["loss"]["shapes"]
    assert "f32[1,8,37]" not in found["loss"]["shapes"]


def test_a_model_cut_over_two_devices_answers_as_on_one(found):
    one, two = found["generation"]["tokens"]
    assert one == two
    assert len({tuple(row) for row in one}) == len(one), "prompts differ, and so do their answers"
    assert found["generation"]["kernel on a device"] == [2, 16, 12]
    assert (
        "down_proj/kernel of shape (24, 16) cannot be cut over tensor 5; take fewer devices"
        in found["generation"]["refusal"]
    )
