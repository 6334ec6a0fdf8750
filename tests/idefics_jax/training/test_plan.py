"""A plan is what the start of the run prints, told before there is a weight."""

import subprocess
import sys

import jax
import pytest

from idefics_jax import sharding
from idefics_jax.errors import UserError
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.plan import plan
from idefics_jax.training.run import assemble


@pytest.fixture
def adapted(values):
    """Every transform at once."""
    values["partition"] = (
        (".*/new_rows", "trainable", 0.1, 0.0),
        (".*/lora_.*", "trainable", 1.0, 0.0),
        ("connector/.*", "trainable", 0.5, 0.1),
        (".*", "frozen"),
    )
    adapter = {"rank": 2, "alpha": 8.0, "dropout": 0.1, "init": "kaiming"}
    values["lora"] = {"text": {"pattern": "text_model/layers/.*", "dora": True, **adapter}}
    values |= {"new_rows": 3, "quantize": ("text_model/layers/mlp/.*",), "frozen_dtype": "bfloat16"}
    return values


def test_a_plan_tells_what_the_start_of_the_run_tells(adapted):
    config = TrainConfig.from_config_dict(adapted)
    lines = str(plan(config)).splitlines()
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use_mesh(mesh, sharding.RULES[config.sharding]):
        run = assemble(config, mesh)
        state, frozen = run.first_state()
    assert lines[:-4] == run.plan.table.splitlines()
    # What a resumed run restores is what a new one begins with.
    for made, restored in zip(
        *map(jax.tree.leaves, ((state, frozen), (run.abstract_state, run.abstract_frozen))), strict=True
    ):
        assert (made.shape, made.dtype) == (restored.shape, restored.dtype)
        assert made.sharding.is_equivalent_to(restored.sharding, made.ndim)
    for line, tree in zip(lines[-4:-1], (frozen, state["trainable"], state["opt_state"]), strict=True):
        assert f": {sum(leaf.nbytes for leaf in jax.tree.leaves(tree)):,} bytes (" in line


def test_a_plan_needs_no_file(adapted):
    wanted = str(plan(TrainConfig.from_config_dict(adapted)))
    adapted |= {"processor": "/nowhere", "init_from": "/nowhere", "init_std": ()}
    assert str(plan(TrainConfig.from_config_dict(adapted))) == wanted


def test_a_pattern_that_matches_nothing_is_refused(adapted):
    adapted["quantize"] = ("text_model/ears/.*",)
    with pytest.raises(UserError, match="quantize: 'text_model/ears/.*' matches no parameter"):
        plan(TrainConfig.from_config_dict(adapted))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_rules": {"longest_edg": 3}}, "image_rules.longest_edg is not a setting; did you mean 'longest_edge'"),
        ({"init_std": (("(", 0.5),)}, r"init_std: '\(' is not a regular expression"),
        ({"init_std": (("foo", 0.5),)}, "init_std: 'foo' matches no parameter"),
        (
            {"init_std": (("text_model/.*", 0.5),), "init_parts": {"text_model": "/nowhere"}},
            r"init_std: 'text_model/\.\*' matches no parameter",
        ),
    ],
)
def test_what_the_run_would_refuse_is_refused(values, change, message):
    with pytest.raises(UserError, match=message):
        plan(TrainConfig.from_config_dict({**values, **change}))


def test_a_plan_in_which_nothing_trains_is_refused(values):
    values["partition"] = ((".*", "frozen"),)
    with pytest.raises(UserError, match="nothing would train"):
        plan(TrainConfig.from_config_dict(values))


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ({"data": 7}, "mesh {'data': 7}: 7 device(s)"),
        ({"data": -1, "fsdp": 4, "tensor": 2}, "mesh {'data': -1, 'fsdp': 4, 'tensor': 2}: a multiple of 8 device(s)"),
    ],
)
def test_a_plan_says_how_many_devices_it_needs_whatever_is_there(values, mesh, said):
    assert str(plan(TrainConfig.from_config_dict({**values, "mesh": mesh}))).splitlines()[-1] == said


@pytest.mark.parametrize(
    ("mesh", "message"),
    [({"rows": 2}, "mesh axis 'rows' is unknown"), ({"data": 0}, "at least 1"), ({"data": -1, "fsdp": -1}, "one -1")],
)
def test_a_plan_for_a_mesh_of_no_devices_is_refused(values, mesh, message):
    with pytest.raises(UserError, match=message):
        plan(TrainConfig.from_config_dict({**values, "mesh": mesh}))


def test_the_command_prints_it_and_needs_no_work_directory():
    command = [sys.executable, "-m", "idefics_jax.train", "--config", "configs/digits.py"]
    done = subprocess.run([*command, "--plan"], capture_output=True, text=True, check=True)
    assert "396,608 parameters, 396,608 of them trainable\n" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: --workdir is missing; see --help\n")
