"""Starts a run on TPU slices of a GKE cluster, as a JobSet of one Job a slice.

    python -m launch.gke --name stage1 --slice v5e-256 --image IMAGE --bucket BUCKET [--dry-run] -- \\
        python -m idefics_jax.train --config configs/idefics2_8b/stage1.py --workdir gs://BUCKET/stage1

`--dry-run` prints the manifest, which `kubectl apply -f -` takes. GKE finds the nodes, or makes them; JobSet starts all
machines of a run again when one of them fails. The form is JobSet's v1alpha2 (github.com/kubernetes-sigs/jobset), the
node labels are GKE's (cloud.google.com/kubernetes-engine/docs/concepts/tpus). launch/README.md has the whole way.
"""

import subprocess
from typing import Any

import yaml
from absl import flags

from idefics_jax import commands
from idefics_jax.errors import UserError
from launch import job as jobs
from launch.job import GIVE_UP_STATUS, MOUNT, Job

# Of a slice's machines to each other, of the TPU's figures, and of jax.distributed's coordinator.
_PORTS = (8471, 8431, 8482)
_EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
_CONTAINER, _VOLUME = "run", "bucket"

flags.adopt_module_key_flags(jobs)
_QUEUE = flags.DEFINE_string("queue", "", "Kueue's local queue, in a cluster that has Kueue")


def manifest(job: Job, queue: str) -> dict[str, Any]:
    """Returns the JobSet of a job.

    Args:
      job: the job.
      queue: Kueue's local queue, or "" where there is no Kueue.

    Raises:
      UserError: several slices of one machine each, which GKE does not join.
    """
    if job.slices.count > 1 and job.slices.hosts == 1:
        raise UserError(f"GKE joins slices of several machines only, and {job.slices.name} has one a slice; take more")
    labels = {"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            **labels,
            # All machines of a Job lie in one node pool, which is one slice where a slice has several machines.
            "annotations": {_EXCLUSIVE: "cloud.google.com/gke-nodepool"} if job.slices.hosts > 1 else {},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                # What a person must mend is not tried again.
                "rules": [
                    {"name": "giveUp", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": job.slices.count, "template": _slice(job)}],
        },
    }


def _slice(job: Job) -> dict[str, Any]:
    """Returns the Job of one slice: a pod on each of its machines, all of them or none."""
    give_up = {"containerName": _CONTAINER, "operator": "In", "values": [GIVE_UP_STATUS]}
    return {
        "spec": {
            "parallelism": job.slices.hosts,
            "completions": job.slices.hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": give_up}]},
            "template": {
                "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"} if job.bucket else {}},
                "spec": _pod(job),
            },
        }
    }


def _pod(job: Job) -> dict[str, Any]:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": job.slices.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": job.slices.topology,
    }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": job.service_account or "default",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": selector,
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [_container(job)],
    }
    attributes = {"bucketName": job.bucket, "mountOptions": "implicit-dirs"}
    if job.slices.count > 1:
        # Slices talk over the machines' own network, which is faster than the pods'.
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
        attributes["hostNetworkPodKSA"] = "true"
    if job.bucket:
        source = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": attributes}
        pod["volumes"] = [{"name": _VOLUME, "csi": source}]
    return pod


def _container(job: Job) -> dict[str, Any]:
    container = {
        "name": _CONTAINER,
        "image": job.image,
        # No shell between: the signal that asks to stop reaches the run itself.
        "command": list(job.watched_command),
        "env": [{"name": name, "value": value} for name, value in job.all_environment.items()],
        "ports": [{"containerPort": port} for port in _PORTS],
        "resources": {"limits": {"google.com/tpu": job.slices.chips_per_host}},
        "securityContext": {"privileged": True},
    }
    if job.bucket:
        container["volumeMounts"] = [{"name": _VOLUME, "mountPath": MOUNT, "readOnly": True}]
    return container


def text(content: dict[str, Any]) -> str:
    """Returns a manifest as YAML."""
    return yaml.safe_dump(content, sort_keys=False, width=120)


def submit(job: Job) -> None:
    """Gives a job to the cluster that kubectl is set to, or with --dry-run prints what it would be given.

    Raises:
      UserError: there is no kubectl, or the cluster refuses it; it has said why.
    """
    content = text(manifest(job, _QUEUE.value))
    if flags.FLAGS["dry-run"].value:
        print(f"---\n{content}", end="")
        return
    try:
        done = subprocess.run(["kubectl", "apply", "-f", "-"], input=content, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("kubectl is not installed; see launch/README.md, or use --dry-run") from error
    if done.returncode:
        raise UserError(f"kubectl apply failed with exit code {done.returncode}; its message stands above")
    first = f"batch.kubernetes.io/job-name={job.name}-slice-0,batch.kubernetes.io/job-completion-index=0"
    print(f"state: kubectl get jobset {job.name}")
    print(f"logs: kubectl logs -f -c {_CONTAINER} -l {first}")
    print(f"end: kubectl delete jobset {job.name}")


def main(command: list[str]) -> None:
    submit(jobs.from_flags(command))


if __name__ == "__main__":
    commands.run(main, required=("name", "slice", "image"), takes_command=True)
