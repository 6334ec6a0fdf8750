"""What the demo ends with."""

import json

from launch import demo


def test_the_last_line_is_how_well_the_model_reads(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps({"exact_match": 0.93125, "questions": 160}))
    *_, last = demo.result(str(tmp_path), 61.2).splitlines()
    assert last == "held-out exact match: 0.931"
