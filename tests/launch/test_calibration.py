"""Errors printed beside estimates are of the estimator and the compiler at hand, and those that the README tells."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from launch import calibration

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("generation", calibration.PUBLISHED)
def test_the_readme_tells_the_error_of_a_published_step(generation):
    told = re.search(rf"(-?\d+) % (?:of what was timed )?on {generation}\b", " ".join(README.split()))
    assert round(100 * calibration.error(generation)) == int(told[1])


def test_what_was_kept_is_of_the_compiler_that_compiles_recipes():
    kept = json.loads(calibration.FILE.read_text())
    assert {one["libtpu"] for one in kept.values()} == {importlib.metadata.version("libtpu")}
    for one in kept.values():
        assert one["collectives"]
        assert {kernel["name"] for kernel in one["kernels"]} >= {"flash_attention_forward", "flash_attention_backward"}
