"""What a finished run took, as one small JSON: for tables that compare runs."""

import json
import resource
import statistics
from typing import Any

import jax
from etils import epath

from idefics_jax.buckets import write_whole
from idefics_jax.training.writers import read_metrics

SUMMARY_FILE = "summary.json"


def write_summary(workdir: epath.Path, trainable: Any, frozen: Any) -> dict[str, float]:
    """Writes `workdir/summary.json` and returns what it holds.

    Args:
      workdir: of the run, with its metrics.jsonl.
      trainable: trained leaves, adapters included.
      frozen: the others.

    Returns:
      "trained_parameters"; "parameters"; "step_seconds", the median over the intervals of progress, without the first,
      which compiles, if there is another; "rejected_documents", of whatever reason (metrics.jsonl has each);
      "host_memory_gib", the process's peak; "device_memory_gib", the fullest device's peak, where the backend tells it.
    """

    def count(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    lines = read_metrics(workdir / "metrics.jsonl")
    rates = [line["perf/steps_per_second"] for line in lines]
    rejected = [count for name, count in lines[-1].items() if name.startswith("data/rejected/")]
    summary: dict[str, float] = {
        "trained_parameters": count(trainable),
        "parameters": count(trainable) + count(frozen),
        "step_seconds": 1 / statistics.median(rates[1:] or rates),
        "rejected_documents": sum(rejected),
        "host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    known = [device.memory_stats() for device in jax.local_devices()]
    if all(known):
        summary["device_memory_gib"] = max(stats["peak_bytes_in_use"] for stats in known) / 2**30
    write_whole(workdir / SUMMARY_FILE, json.dumps(summary, indent=1).encode() + b"\n")
    return summary
