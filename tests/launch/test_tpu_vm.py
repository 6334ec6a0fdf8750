"""What is asked of Google's queue is what gcloud takes, and the startup script runs the command until it is done."""

import shlex
import subprocess
import sys

import pytest

from launch.job import Job
from launch.slices import SLICES, find
from launch.tpu_vm import startup_script
from tests.launch.gcloud import unknown_flags


def tpu_vm(*arguments, **environment):
    command = [sys.executable, "-m", "launch.tpu_vm", "--zone=us-west4-a", "--image=x.pkg.dev/p/i:1", *arguments]
    return subprocess.run(
        [*command, "--", "python", "-m", "idefics_jax.train", "--config.paths=('a b',)"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", **environment},
    )


@pytest.mark.parametrize("name", ["v4-128", "2xv5e-256", "v5p-512"])
def test_dry_run_prints_a_program_that_asks_for_the_slices(name):
    done = tpu_vm("--name=stage1", f"--slice={name}", "--bucket=my-bucket", "--spot", "--dry-run")
    assert done.returncode == 0, done.stderr
    script, _, command = done.stdout.partition("END OF SCRIPT\ngcloud")
    words = shlex.split(f"gcloud{command}")
    assert unknown_flags(words) == []
    assert f"--accelerator-type={find(name).accelerator_type}" in words
    assert ("--node-count=2" in words) == (find(name).count == 2) == ("--node-id=stage1" not in words)
    assert "--spot" in words
    assert "gcsfuse --implicit-dirs -o ro my-bucket /bucket" in script


def test_the_request_and_what_watches_it_are_what_gcloud_takes(tmp_path):
    log = tmp_path / "asked"
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/bash\nprintf "%q " gcloud "$@" > {log}\n')
    gcloud.chmod(0o755)
    done = tpu_vm("--name=a", "--slice=2xv5p-8", "--service_account=b@c.d", "--reserved", PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    asked = shlex.split(log.read_text())
    assert unknown_flags(asked) == []
    assert asked[-1].startswith("--metadata-from-file=startup-script=/")
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(lines) == ["state", "logs", "boot", "end"]
    for line in lines.values():
        assert unknown_flags(shlex.split(line)) == []
    assert shlex.split(lines["logs"])[5] == "a-0", "of several slices the first is watched"


def test_a_misspelt_flag_is_seen():
    words = "gcloud compute tpus queued-resources create a --zone=b --accelerator=c"
    assert unknown_flags(words.split()) == ["--accelerator"]


def test_without_gcloud_it_is_a_sentence():
    done = tpu_vm("--name=a", "--slice=v4-8")
    assert done.returncode == 2
    assert done.stderr == "error: gcloud is not installed; see launch/README.md, or use --dry-run\n"


def job(**changed):
    settings = {
        "name": "stage1",
        "slices": find("v4-16"),
        "image": "us-docker.pkg.dev/p/r/i:1",
        "command": ("python", "-m", "idefics_jax.train", "--config.paths=('a b',)"),
        "bucket": "my-bucket",
        "environment": {"A": "one two"},
        "service_account": "",
        "grace_seconds": 90,
        "max_restarts": 2,
        "spot": False,
    }
    return Job(**{**settings, **changed})


@pytest.mark.parametrize(
    ("statuses", "ran", "ended"),
    [((75, 1, 0, 0), 3, 0), ((2, 0), 1, 2), ((75, 75, 75, 0), 3, 75)],
    ids=["again until it is done", "not again where a person must mend", "as often as allowed"],
)
def test_startup_script_runs_the_command_again_after_a_stop_or_a_death(statuses, ran, ended, tmp_path):
    """The script itself runs; docker and the machine's own programs only write down how they were called."""
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)))
    note = f'printf "%q " $(basename $0) "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n'
    take = f"[ $1 = run ] || exit 0\nread -r s < {tmp_path}/statuses; sed -i 1d {tmp_path}/statuses; exit $s\n"
    for program in ("docker", "gcloud", "gcsfuse", "mkdir", "mountpoint", "sleep"):
        body = take if program == "docker" else f"exit {int(program == 'mountpoint')}\n"
        (tmp_path / program).write_text(f"#!/bin/bash\n{note}{body}")
        (tmp_path / program).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["bash", "-c", startup_script(job())], env={"PATH": path}, capture_output=True, check=False)
    assert done.returncode == ended, done.stderr
    calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    runs = [call for call in calls if call[:2] == ["docker", "run"]]
    assert len(runs) == ran
    assert runs[0][-8:] == ["python", "-m", "launch.watch", "--", *job().command]
    for words in (["-e", "A=one two"], ["-e", "IDEFICS_STOPPED_STATUS=75"], ["--stop-timeout=90"], ["--privileged"]):
        assert all(word in runs[0] for word in words)
    assert ["gcsfuse", "--implicit-dirs", "-o", "ro", "my-bucket", "/bucket"] in calls
    assert ["gcloud", "auth", "configure-docker", "us-docker.pkg.dev", "--quiet"] in calls


@pytest.mark.parametrize("name", SLICES)
def test_startup_script_of_every_slice_is_bash(name):
    script = startup_script(job(slices=find(name), bucket="", image="busybox"))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "gcsfuse" not in script
    assert "configure-docker" not in script
