"""Generation at a tiny size, compiled for a slice, beside its roofline."""

import dataclasses

import pytest

from configs.idefics2_8b import instruct
from idefics_jax import sharding
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.plan import plan
from launch import calibration, generation, program, slices
from tests.idefics_jax import tiny

# A key head on each of the slice's chips.
TEXT = dataclasses.replace(tiny.CONFIG.text_config, num_key_value_heads=4)


CONFIG = dataclasses.replace(tiny.CONFIG, text_config=TEXT)


@pytest.fixture(scope="module")
def costs():
    return generation.compiled(CONFIG, 1, sharding.make_mesh({"tensor": -1}, program.slice_devices("v5p-8")))


def test_prompts_are_read_and_tokens_made_on_a_slice(costs):
    config, where = CONFIG, slices.find("v5p-8")
    least = generation.least_seconds(config, 1, where)
    read, made = (generation.seconds(cost, config, where, bound) for cost, bound in zip(costs, least, strict=True))
    assert read > made >= least[1] > 0
    assert all(0 < cost.peak_bytes < 2**30 for cost in costs)
    assert {one.kind for cost in costs for one in cost.collectives} >= {"all-reduce"}


def test_the_report_tells_how_far_such_estimates_are_off(costs, monkeypatch, capsys):
    monkeypatch.setattr(generation, "compiled", lambda *_: costs)
    numbers = generation.report(CONFIG, "v5p-8", [1])
    assert numbers["fits"]
    assert numbers["prefill_1_seconds"] > numbers["decode_1_seconds"] >= numbers["decode_1_roofline_seconds"] > 0
    assert numbers["calibration_error"] == calibration.error("v5p")
    assert "the same reckoning of a published step (AXLearn" in capsys.readouterr().out


def test_the_roofline_of_a_token_is_the_weights_read_once_and_the_cache_of_each_row():
    config, where = plan(TrainConfig.from_config_dict(instruct.get_config().to_dict())).sizes, slices.find("v5e-8")
    (_, one), (_, many) = (generation.least_seconds(config, rows, where) for rows in (1, 32))
    # 32 layers of 218 M parameters and a head of 131 M, two bytes each, at 8 x 810 GB/s.
    assert one == pytest.approx(2 * (32 * 218.1e6 + 131e6) / (8 * 810e9), rel=0.01)
    # Keys and values: 8 heads of 128 in 32 layers, of 320 tokens.
    assert many - one == pytest.approx(31 * 2 * 2 * 32 * 8 * 128 * 320 / (8 * 810e9), rel=0.01)
