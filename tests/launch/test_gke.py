"""The manifest is one that JobSet v1alpha2 and GKE take, for every slice."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import yaml

from idefics_jax.errors import UserError
from launch.gke import manifest, text
from launch.job import Job
from launch.slices import SLICES, find
from tests.launch import jobset

WATCHED = ("python", "-m", "launch.watch", "--")
JOB = Job(
    name="stage1",
    slices=find("v5e-256"),
    image="us-docker.pkg.dev/project/repository/idefics:1",
    command=("python", "-m", "idefics_jax.train", "--config", "configs/digits.py"),
    bucket="my-bucket",
    environment={"LIBTPU_INIT_ARGS": "--one=1 --two=2"},
    service_account="trainer",
    grace_seconds=600,
    max_restarts=7,
    spot=True,
)
QUEUE = "pods"


def pod_of(content):
    return content["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", [*SLICES, "2xv5e-256"])
def test_manifest_of_every_slice_is_of_the_published_form(name):
    job = dataclasses.replace(JOB, slices=find(name), name="n" * 40)
    content = yaml.safe_load(text(manifest(job, QUEUE)))
    assert jobset.faults(content) == []
    assert all(map(jobset.is_label, jobset.names(content)))


@pytest.mark.parametrize("name", [*SLICES, "2xv5e-256"])
def test_manifest_asks_for_every_chip_of_the_slice_once(name):
    content = manifest(dataclasses.replace(JOB, slices=find(name)), QUEUE)
    (replicated,) = content["spec"]["replicatedJobs"]
    pods = replicated["replicas"] * replicated["template"]["spec"]["completions"]
    assert replicated["template"]["spec"]["parallelism"] == replicated["template"]["spec"]["completions"]
    (container,) = pod_of(content)["containers"]
    chips = {"v4": 2, "v5p": 2, "v5e": 1}[find(name).generation]
    assert pods * container["resources"]["limits"]["google.com/tpu"] == find(name).count * find(name).size // chips
    assert pod_of(content)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": find(name).gke_accelerator,
        "cloud.google.com/gke-tpu-topology": find(name).topology,
        "cloud.google.com/gke-spot": "true",
    }


def misspell(content):
    content["spec"]["failurePolicy"]["maxRestart"] = content["spec"]["failurePolicy"].pop("maxRestarts")


def as_text(content):
    pod_of(content)["terminationGracePeriodSeconds"] = "600"


def nameless(content):
    del pod_of(content)["containers"][0]["name"]


def other_word(content):
    pod_of(content)["restartPolicy"] = "OnSuccess"


def number_in_environment(content):
    pod_of(content)["containers"][0]["env"][0]["value"] = 75


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (misspell, "JobSet.spec.failurePolicy.maxRestart is no field of FailurePolicy"),
        (as_text, "terminationGracePeriodSeconds is '600', not of type int"),
        (nameless, "containers[0].name is missing"),
        (other_word, "restartPolicy is 'OnSuccess', none of Always|OnFailure|Never"),
        (number_in_environment, "env[0].value is 75, not of type string"),
    ],
)
def test_the_yardstick_sees_what_is_wrong(spoil, said):
    content = copy.deepcopy(manifest(JOB, QUEUE))
    spoil(content)
    (line,) = jobset.faults(content)
    assert said in line


def test_a_run_that_was_stopped_starts_again_and_one_that_must_be_mended_does_not():
    content = manifest(JOB, QUEUE)
    job = content["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = pod_of(content)["containers"]
    status = int(next(item["value"] for item in container["env"] if item["name"] == "IDEFICS_STOPPED_STATUS"))
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert status not in (0, 2), "0 would end the JobSet well, 2 would end it for good"
    assert job["backoffLimit"] == 0, "when one machine fails all of them start again"
    assert pod_of(content)["restartPolicy"] == "Never"
    assert content["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod_of(content)["terminationGracePeriodSeconds"] == 600


def test_the_command_is_run_as_it_is_without_a_shell():
    (container,) = pod_of(manifest(JOB, QUEUE))["containers"]
    assert container["command"] == [*WATCHED, *JOB.command]
    assert {"name": "LIBTPU_INIT_ARGS", "value": "--one=1 --two=2"} in container["env"]


def test_without_a_bucket_nothing_is_mounted():
    content = manifest(dataclasses.replace(JOB, bucket=""), QUEUE)
    assert "gcsfuse" not in text(content)
    assert jobset.faults(content) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "Stage_1"}, "the job's name is 'Stage_1'; give at most 40"),
        ({"name": "n" * 41}, "give at most 40"),
        ({"bucket": "gs://my-bucket"}, "--bucket is 'gs://my-bucket'; give the bucket's name alone"),
        ({"image": ""}, "--image is ''"),
        ({"grace_seconds": -1}, "--grace_seconds is -1"),
    ],
)
def test_what_google_would_refuse_is_refused_here(changed, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(JOB, **changed)


def test_slices_of_one_machine_are_not_joined():
    with pytest.raises(UserError, match="GKE joins slices of several machines only, and 2xv5e-8 has one a slice"):
        manifest(dataclasses.replace(JOB, slices=find("2xv5e-8")), QUEUE)


def test_dry_run_prints_the_manifest_and_runs_nothing():
    arguments = ["--name=a", "--slice=v4-16", "--image=i", "--env=A=b=c", "--dry-run", "--", "python", "-m", "x", "--y"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.gke", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": ""},
    )
    content = yaml.safe_load(done.stdout)
    assert jobset.faults(content) == []
    (container,) = pod_of(content)["containers"]
    assert container["command"] == [*WATCHED, "python", "-m", "x", "--y"]
    assert {"name": "A", "value": "b=c"} in container["env"]
