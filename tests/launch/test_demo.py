"""What the demo ends with."""

import json
import subprocess
import sys


def test_the_last_line_is_how_well_the_model_reads(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps({"exact_match": 0.93125, "questions": 160}))
    # In a process of its own: two commands with a flag of one name cannot be imported into one.
    program = f"from launch import demo; print(demo.result({str(tmp_path)!r}, 61.2))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "held-out exact match: 0.931"
