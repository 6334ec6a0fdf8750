"""A recipe's step, at a tiny size, compiled for a slice of each generation; and one that must not fit."""

import collections

import pytest

from configs.idefics2_8b import stage1
from launch import aot, program, slices
from tests.launch import tiny_recipes

NUMBERS = ("fits", "peak_gib", "estimated_mfu", "estimated_step_seconds")


def recipe(devices: int):
    config = tiny_recipes.shrink(stage1.get_config(), "nowhere")
    config.data.shape.update({"rows": devices, "vision_rows": 1, "images": 2})
    config.data.virtual_shards = 1
    config.mesh = {"fsdp": devices}
    # As few operations as a step can have: each takes the compiler as long as a large one.
    config.lora, config.new_rows, config.loss_chunk = {}, 0, config.data.shape.tokens
    config.partition = (("text_model/lm_head/.*", "trainable", 1.0, 0.0), (".*", "frozen"))
    return config.lock()


@pytest.mark.parametrize("name", ["v4-8", "v5e-8", "v5p-8"])
def test_a_recipe_is_compiled_for_a_slice_of_each_generation(name, capsys):
    config = recipe(slices.find(name).chips)
    found = aot.check(config, name, rows=aot.full_rows(aot.BatchShape(**config.data.shape)), dump_to=None)
    assert found["fits"]
    assert 0 < found["peak_gib"] < 1
    assert 0 < found["estimated_mfu"] < found["estimated_hfu"] < 1
    assert found["estimated_step_seconds"] > 0
    said = capsys.readouterr().out
    assert "all-gather" in said or "all-reduce" in said
    assert "collectives that nothing hides" in said


@pytest.mark.parametrize(("room", "largest"), [(0, None), (1, (1, "1 fit")), (5, (4, "4 fit")), (8, (8, "8 fit"))])
def test_a_search_doubles_until_it_does_not_fit(room, largest):
    assert aot.doubled(lambda count: f"{count} fit" if count <= room else None) == largest


def test_a_step_that_does_not_fit_is_told_with_what_it_wants(capsys):
    config = recipe(8)
    config.data.shape.rows, config.rows_a_device = 8 * 2**16, 2**16
    found = aot.check(config, "v5e-8", rows=aot.full_rows(aot.BatchShape(**config.data.shape)), dump_to=None)
    assert not found["fits"]
    assert found["peak_gib"] > 15.75
    assert "it does not fit" in capsys.readouterr().out


def moved(collectives):
    """What passes between devices, whatever it runs beside: cycles are not told before there is code."""
    counts = collections.Counter()
    for one in collectives:
        counts[one.kind, one.shape, one.devices] += one.count
    return counts


def test_what_the_compiler_writes_as_it_goes_tells_memory_and_collectives(tmp_path):
    config = recipe(8)
    compiled = aot.compile_step(aot.TrainConfig.from_config_dict(config.to_dict()), "v5e-8", dump_to=str(tmp_path))
    peak, collectives = program.dumped(tmp_path, "jit_step")
    # It counts constants and what calls take, a page at least each; of a large program both are nothing.
    assert compiled.cost.peak_bytes <= peak < compiled.cost.peak_bytes + 2**21
    assert moved(collectives) == moved(compiled.cost.collectives)
    assert program.dumped(tmp_path, "jit_other") is None
