"""Starts a run on TPU VMs: asks Google's queue for slices whose machines run the command by themselves.

    python -m launch.tpu_vm --zone us-west4-a --name stage1 --slice v5e-256 --image IMAGE --bucket BUCKET [--dry-run] \\
        -- python -m idefics_jax.train --config configs/idefics2_8b/stage1.py --workdir gs://BUCKET/stage1

The request is a queued resource (cloud.google.com/tpu/docs/queued-resources) with a startup script, which every machine
of every slice runs each time it starts: nothing has to wait here. `--dry-run` prints both as a shell program. What is
rented stays rented when the run ends; the last line printed deletes it. launch/README.md has the whole way.
"""

import shlex
import subprocess
import tempfile
from pathlib import Path

from absl import flags

from idefics_jax import commands
from idefics_jax.errors import UserError
from launch import job as jobs
from launch.job import GIVE_UP_STATUS, MOUNT, Job

# What a machine starts with: Ubuntu and docker (cloud.google.com/tpu/docs/runtimes; `tpu-vm versions list` has all).
RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5"}
CONTAINER = "run"

flags.adopt_module_key_flags(jobs)
_ZONE = flags.DEFINE_string("zone", None, "zone that has such slices, as us-west4-a")
_RESERVED = flags.DEFINE_boolean("reserved", False, "take capacity that is reserved for the project")
_RUNTIME = flags.DEFINE_string("runtime_version", "", "software of the machines; what fits the slice if not given")


def startup_script(job: Job) -> str:
    """Returns the program of every machine: mount the bucket, run the command, and again when it has died."""
    lines = [
        "#!/bin/bash",
        f"# {job.name}: runs on every machine of {job.slices.name}, at each of its starts.",
        "set -u",
        "export HOME=/root DEBIAN_FRONTEND=noninteractive  # a startup script has neither",
    ]
    if job.bucket:
        lines += _MOUNTING.format(bucket=job.bucket, mount=MOUNT).splitlines()
    registry = job.image.split("/")[0]
    if registry.endswith("pkg.dev"):
        lines.append(f"gcloud auth configure-docker {registry} --quiet")
    return "\n".join([*lines, _RUNNING.format(run=_docker(job), last=job.max_restarts, give_up=GIVE_UP_STATUS)])


_MOUNTING = """\
if ! command -v gcsfuse; then
  key=/usr/share/keyrings/cloud.google.asc
  source="https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main"
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg -o $key
  echo "deb [signed-by=$key] $source" > /etc/apt/sources.list.d/gcsfuse.list
  apt-get update && apt-get -o DPkg::Lock::Timeout=300 install -y gcsfuse
fi
mkdir -p {mount}
mountpoint -q {mount} || gcsfuse --implicit-dirs -o ro {bucket} {mount} || exit 1"""

_RUNNING = """\
for attempt in $(seq 0 {last}); do
  docker rm -f run
  {run}
  status=$?
  echo "attempt $attempt ended with status $status"
  if [ $status = 0 ] || [ $status = {give_up} ]; then exit $status; fi
  sleep 10
done
exit $status
"""


def _docker(job: Job) -> str:
    words = ["docker", "run", "--name", CONTAINER, "--privileged", "--net=host", f"--stop-timeout={job.grace_seconds}"]
    words += ["-v", f"{MOUNT}:{MOUNT}:ro"] if job.bucket else []
    words += [word for name, value in job.all_environment.items() for word in ("-e", f"{name}={value}")]
    return shlex.join([*words, job.image, *job.watched_command])


def create(job: Job, script: str) -> list[str]:
    """Returns the command that asks for the job's slices; `script` is the path of its startup script."""
    if job.slices.count > 1:
        nodes = [f"--node-count={job.slices.count}", f"--node-prefix={job.name}"]
    else:
        nodes = [f"--node-id={job.name}"]
    return [
        *("gcloud", "compute", "tpus", "queued-resources", "create", job.name),
        f"--zone={_ZONE.value}",
        *nodes,
        f"--accelerator-type={job.slices.accelerator_type}",
        f"--runtime-version={_RUNTIME.value or RUNTIMES[job.slices.generation]}",
        *(["--spot"] if job.spot else []),
        *(["--reserved"] if _RESERVED.value else []),
        *([f"--service-account={job.service_account}"] if job.service_account else []),
        f"--metadata-from-file=startup-script={script}",
    ]


def watching(job: Job) -> dict[str, list[str]]:
    """Returns the commands that say where the job stands, show what its first process prints, and end it."""
    first = f"{job.name}-0" if job.slices.count > 1 else job.name
    resource, zone = ["gcloud", "compute", "tpus", "queued-resources"], f"--zone={_ZONE.value}"
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", first, zone, "--worker=0"]
    return {
        "state": [*resource, "describe", job.name, zone, "--format=value(state.state)"],
        "logs": [*ssh, f"--command=sudo docker logs -f --tail=100 {CONTAINER}"],
        "boot": [*ssh, "--command=sudo journalctl -u google-startup-scripts.service"],
        "end": [*resource, "delete", job.name, zone, "--force", "--quiet"],
    }


def submit(job: Job) -> None:
    """Puts the request for a job's slices into the queue, or with --dry-run prints the shell program that would.

    Raises:
      UserError: no zone is given, there is no gcloud, or the request was refused; it has said why.
    """
    if not _ZONE.value:
        raise UserError("--zone is missing; give one that has such slices, as us-west4-a")
    script = startup_script(job)
    if flags.FLAGS["dry-run"].value:
        path = f"/tmp/{job.name}.sh"
        print(f"cat > {path} << 'END OF SCRIPT'\n{script}END OF SCRIPT\n{shlex.join(create(job, path))}")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "startup.sh")
        path.write_text(script)
        try:
            done = subprocess.run(create(job, str(path)), check=False)
        except FileNotFoundError as error:
            raise UserError("gcloud is not installed; see launch/README.md, or use --dry-run") from error
    if done.returncode:
        raise UserError(f"the request failed with exit code {done.returncode}; gcloud's message stands above")
    for what, words in watching(job).items():
        print(f"{what}: {shlex.join(words)}")


def main(command: list[str]) -> None:
    submit(jobs.from_flags(command))


if __name__ == "__main__":
    commands.run(main, required=("name", "slice", "image", "zone"), takes_command=True)
