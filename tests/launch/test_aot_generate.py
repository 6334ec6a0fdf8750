"""Generation at a tiny size, compiled for a slice, beside its roofline."""

import dataclasses

import pytest

from configs.idefics2_8b import instruct
from launch import aot_generate, slices
from tests.idefics_jax import tiny

# A key head on each of the slice's chips.
TEXT = dataclasses.replace(tiny.CONFIG.text_config, num_key_value_heads=4)


def test_prompts_are_read_and_tokens_made_on_a_slice(capsys):
    found = aot_generate.report(dataclasses.replace(tiny.CONFIG, text_config=TEXT), "v5p-8", [1])
    assert set(found) == {
        f"{phase}_1_{n}" for phase in ("prefill", "decode") for n in ("seconds", "roofline_seconds", "peak_gib")
    }
    assert found["prefill_1_seconds"] > found["decode_1_seconds"] >= found["decode_1_roofline_seconds"] > 0
    said = capsys.readouterr().out
    assert "prefill, batch 1" in said
    assert "decode, batch 1" in said


def test_the_roofline_of_a_token_is_the_weights_read_once_and_the_cache_of_each_row():
    config = aot_generate.plan(aot_generate.TrainConfig.from_config_dict(instruct.get_config().to_dict())).sizes
    where = slices.find("v5e-8")
    (_, one), (_, many) = (aot_generate.least_seconds(config, rows, where) for rows in (1, 32))
    # 32 layers of 218 M parameters and a head of 131 M, two bytes each, at 8 x 810 GB/s.
    assert one == pytest.approx(2 * (32 * 218.1e6 + 131e6) / (8 * 810e9), rel=0.01)
    # Keys and values: 8 heads of 128 in 32 layers, of 320 tokens.
    assert many - one == pytest.approx(31 * 2 * 2 * 32 * 8 * 128 * 320 / (8 * 810e9), rel=0.01)
