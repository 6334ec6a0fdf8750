"""Several real processes: they train as one does, share checkpoints, and end together when one of them is lost."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from idefics_jax import processes
from idefics_jax.convert.orbax import load_model
from idefics_jax.errors import UserError
from idefics_jax.param_transforms import paths
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.loop import train
from idefics_jax.training.writers import read_metrics
from launch.processes import environment, free_port
from tests.idefics_jax.training import small_run

MEMBER = ("python", "-m", "tests.launch.member")
# From a loss to the end of the run.
LIMIT_SECONDS = 15


@contextlib.contextmanager
def launched(*command, count, devices):
    """A group, its output one stream of lines; killed if the test leaves it running."""
    arguments = [sys.executable, "-m", "launch.processes", "-n", str(count), f"--devices={devices}", "--", *command]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as group:
        try:
            yield group
        finally:
            if group.poll() is None:
                group.send_signal(signal.SIGTERM)
                group.send_signal(signal.SIGTERM)


def finished(*command, count, devices):
    """Runs a group to its end; returns its exit status and what it printed."""
    with launched(*command, count=count, devices=devices) as group:
        said = group.stdout.read()
    return group.returncode, said


def until(lines, pattern):
    """Reads lines up to the one that matches."""
    said = ""
    for line in lines:
        said += line
        if re.search(pattern, line):
            return
    raise AssertionError(said)


def member(group, index):
    """The pid of a process of the group."""
    children = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    wanted = f"{processes.INDEX}={index}\0"
    return next(int(pid) for pid in children if wanted in Path(f"/proc/{pid}/environ").read_text())


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """A run of three steps on 4 rows, each a virtual shard of its own."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    small_run.build_data(folder)
    values = small_run.settings(folder)
    values["data"]["shape"]["rows"] = values["data"]["virtual_shards"] = 4
    for part in ("vision_config", "text_config"):
        values["model"][part]["num_hidden_layers"] = 1
    values |= {
        "steps": 3,
        "log_every": 1,
        "checkpoint_every": 1,
        "keep_checkpoints": 3,
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        "sharding": "fsdp_tensor",
    }
    return values


def test_a_run_that_two_processes_go_on_with_is_that_of_one_device(values, tmp_path):
    """Begun on one device, ended on two that both hold all rows and half of every kernel: the same but for rounding.

    What both save of the data's position is that of the one, to the bit.
    """
    workdir, alone = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "alone")
    train(TrainConfig.from_config_dict(values), values, alone)
    shutil.copytree(alone, workdir)
    for later in ("model", "checkpoints/2", "checkpoints/3", "data_position"):
        shutil.rmtree(workdir / later)
    command = ["python", "-m", "idefics_jax.train", f"--config={small_run.config_file(values, tmp_path)}"]
    command += [f"--workdir={workdir}", "--config.mesh.data=1", "--config.mesh.tensor=2"]
    status, said = finished(*command, count=2, devices=1)
    assert status == 0, said
    assert "[0] resumed after step 1" in said
    assert "[1]" not in said
    for ours, theirs in zip(
        read_metrics(workdir / "metrics.jsonl"), read_metrics(alone / "metrics.jsonl"), strict=True
    ):
        measured = {name for name in theirs if not name.startswith("perf/")}
        np.testing.assert_allclose([ours[n] for n in measured], [theirs[n] for n in measured], rtol=1e-5, atol=1e-5)
    for folder in ("data_position", "checkpoints/2/data", "checkpoints/3/data"):
        for file in (alone / folder).glob("*.json"):
            assert (workdir / folder / file.name).read_text() == file.read_text()
    trained, wanted = (paths.flatten(load_model(folder / "model")[0]) for folder in (workdir, alone))
    for path, leaf in wanted.items():
        np.testing.assert_allclose(trained[path], leaf, atol=1e-5, err_msg=path)


def test_a_signal_to_one_process_stops_all_at_the_same_step():
    with launched(*MEMBER, "steps", count=2, devices=1) as group:
        until(group.stdout, "step 1$")
        os.kill(member(group, 1), signal.SIGTERM)
        said = group.stdout.read()
    assert group.returncode == 0
    first, second = re.search(r"^\[0\] stopped at (\d+) and (\d+)$", said, re.M).groups()
    assert first == second


def test_processes_that_do_not_share_the_work_directory_are_told_so(values, tmp_path):
    """Each machine of a pod has a disk of its own."""
    file, own = small_run.config_file(values, tmp_path), f"{tmp_path}/${processes.INDEX}"
    command = f"exec {sys.executable} -m idefics_jax.train --config={file} --workdir={own}"
    status, said = finished("sh", "-c", command, count=2, devices=1)
    assert status == 2
    assert "of process 1 is not that of process 0; give a folder that all machines share" in said


def test_a_checkpoint_of_four_processes_is_restored_by_two_and_by_one_to_the_bit(tmp_path):
    """8 devices cut along one dim -> 4 along another -> 1 device."""
    status, said = finished(*MEMBER, "save", str(tmp_path), "fsdp", count=4, devices=2)
    assert status == 0, said
    status, said = finished(*MEMBER, "restore", str(tmp_path), "tensor", count=2, devices=2)
    assert status == 0, said
    assert "[0] tensor on 4 devices, a part (2, 64, 8), equal: True" in said
    status, said = finished(*MEMBER, "restore", str(tmp_path), "tensor", count=1, devices=1)
    assert status == 0, said
    assert "[0] tensor on 1 devices, a part (2, 64, 32), equal: True" in said


def test_processes_tell_each_other_what_they_hold_and_meet_and_deal_out_the_rows():
    """Rows are split between processes, or shared by those that a mesh cuts the parameters alone between."""
    status, said = finished(*MEMBER, "exchange", count=2, devices=2)
    assert status == 0, said
    refused = "data.shape.rows is 6; the mesh spreads them over 4 devices, so give a multiple"
    shares = [[[0, 2, True], [0, 2, True], [0, 1, True]], [[1, 2, True], [1, 2, True], [0, 1, False]]]
    assert said.splitlines() == [
        f"[0] 0 | RuntimeError: 'only here' | {shares[0]} | {refused}",
        f"[0] 1 | KeyError: 'only here' | {shares[1]} | {refused}",
    ]


@pytest.mark.parametrize(("number", "what"), [(signal.SIGKILL, "was ended by SIGKILL"), (signal.SIGSTOP, "is stopped")])
def test_a_process_that_dies_or_freezes_ends_the_run_and_is_named(number, what):
    """Also where each is a shell's, whose child the others wait for."""
    with launched("sh", "-c", f"{sys.executable} -m tests.launch.member beat; exit $?", count=2, devices=1) as group:
        until(group.stdout, "beat 1$")
        lost = member(group, 1)
        (child,) = Path(f"/proc/{lost}/task/{lost}/children").read_text().split()
        os.kill(int(child), number)
        since = time.monotonic()
        said = group.stdout.read().splitlines()
    assert time.monotonic() - since < LIMIT_SECONDS
    assert said[-1] == f"error: process 1 of 2 (pid {lost}) {what}; the others were ended"
    assert {line for line in said[:-1] if not line.startswith("[0] beat")} <= {"[1] Killed"}  # so says the shell
    assert group.returncode not in (0, None)
    assert not Path(f"/proc/{lost}").exists()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_without_a_common_launcher_a_lost_process_ends_the_others_by_heartbeats_and_is_named(number):
    """As on a pod, where each machine watches its own process alone."""
    address = f"127.0.0.1:{free_port()}"
    lost, other = (
        subprocess.Popen(
            [sys.executable, *watch, *MEMBER[1:], "beat"],
            env={
                **os.environ,
                **environment(address, count=2, index=index, devices=1),
                processes.HEARTBEAT: "4",  # of 10: the limit leaves room for a busy machine
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, watch in ((1, []), (0, ["-m", "launch.watch", "--", sys.executable]))
    )
    try:
        until(other.stdout, "beat 1$")
        lost.send_signal(number)
        _, errors = other.communicate(timeout=LIMIT_SECONDS)
        said = "process 1 sent no heartbeats any more, so this process 0 was ended; see the log of the lost one"
        assert (other.returncode, errors) == (1, f"error: {said}\n")
    finally:
        for process in (lost, other):
            process.kill()
            process.communicate()


def test_a_mistake_is_one_sentence_whoever_meets_it():
    for index, told_by in (("1", 1), ("all", 0)):
        status, said = finished(*MEMBER, "fail", index, count=2, devices=1)
        assert status == 2
        assert said.splitlines()[0] == f"[{told_by}] error: mend process {index}"
        assert re.fullmatch(rf"error: process {told_by} of 2 .* ended with status 2; .*", said.splitlines()[1])
        assert len(said.splitlines()) == 2
    assert finished("pyhton", count=2, devices=1) == (
        2,
        "error: there is no program 'pyhton'; write the command as in a shell, as python -m MODULE\n",
    )


def test_a_signal_is_passed_on_once_and_the_second_kills():
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))"
    command = ["python", "-c", f"{stubborn}; print('ready', flush=True)\nwhile True: time.sleep(0.1)"]
    with launched(*command, count=1, devices=1) as group:
        until(group.stdout, "ready")
        group.send_signal(signal.SIGINT)
        until(group.stdout, "asked")
        group.send_signal(signal.SIGINT)
        assert "was ended by SIGKILL" in group.stdout.read()
    assert group.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({processes.INDEX: None}, "JAX_PROCESS_ID is not set; .* go together"),
        ({processes.INDEX: "2"}, "JAX_PROCESS_ID is 2 and JAX_NUM_PROCESSES 2; processes are counted from 0"),
        ({processes.COUNT: "two"}, "JAX_NUM_PROCESSES is 'two'; it must be a whole number of at least 1"),
        ({processes.HEARTBEAT: "0"}, "JAX_HEARTBEAT_TIMEOUT_SECONDS is '0'; it must be a whole number"),
    ],
)
def test_half_an_environment_is_refused(changed, message, monkeypatch):
    given = {processes.ADDRESS: "127.0.0.1:1", processes.COUNT: "2", processes.INDEX: "0"}
    for name, value in {**given, **changed}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), processes.joined():
        pass
