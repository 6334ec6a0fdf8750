import json

import numpy as np
from etils import epath

from idefics_jax.training.summary import SUMMARY_FILE, write_summary


def test_a_summary_counts_parameters_and_rejected_documents_and_leaves_out_compiling(tmp_path):
    lines = [
        {"step": 1, "perf/steps_per_second": 0.1, "data/rejected/empty": 1.0},
        {"step": 2, "perf/steps_per_second": 4.0, "data/rejected/empty": 2.0, "data/rejected/bomb": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = write_summary(epath.Path(tmp_path), {"a": np.zeros((2, 3))}, {"b": np.zeros(4)})
    assert (summary["trained_parameters"], summary["parameters"]) == (6, 10)
    assert summary["step_seconds"] == 0.25
    assert summary["rejected_documents"] == 5
    assert summary == json.loads((tmp_path / SUMMARY_FILE).read_text())
