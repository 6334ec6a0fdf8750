import itertools

import pytest

from benchmarks import photographs, pipeline, pipeline_sides, pipeline_steps
from idefics_jax import images
from idefics_jax.image_gate import open_image


@pytest.fixture(scope="module")
def some() -> list[bytes]:
    return list(itertools.islice(photographs.photographs(0.2), len(photographs.ASPECTS)))


def test_photographs_have_the_asked_pixels_and_aspects(some):
    sizes = [open_image(data, max_pixels=10**6).size for data in some]
    assert [width * height for width, height in sizes] == pytest.approx([200_000] * len(sizes), rel=0.01)
    assert [width / height for width, height in sizes] == pytest.approx(photographs.ASPECTS, rel=0.01)


def test_the_bare_side_makes_the_reference_s_pixels(some):
    for data in some:
        size = images.resized_size(*images.image_size(data, pipeline_sides.RULES), pipeline_sides.RULES, 1.0)
        pipeline_sides.check_pixels(data, size)


def test_ratios_are_paired():
    assert pipeline.ratio([1.0, 4.0, 30.0], [1.0, 2.0, 3.0]) == 2.0


def test_steps_are_all_timed(tmp_path, some, monkeypatch):
    monkeypatch.setattr(photographs, "photographs", lambda megapixels: iter(some))
    pipeline.prepare(tmp_path / "0.2", 0.2)
    assert set(pipeline_steps.steps(tmp_path / "0.2")) == set(pipeline_steps.STEPS)
    assert pipeline_steps.difference(tmp_path / "0.2") < 0.02
