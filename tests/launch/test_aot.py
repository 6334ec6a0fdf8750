"""A recipe's step, at a tiny size, compiled for a slice of each generation; and one that must not fit."""

import collections

import hypothesis
import hypothesis.strategies as st
import pytest

from configs.idefics2_8b import stage1
from idefics_jax.errors import UserError
from launch import aot, program, slices
from launch.frontier import divisors, frontier
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


@hypothesis.given(st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_a_search_finds_all_of_the_edge_with_few_tries(fits_from):
    """Of each first policy the second ones from some on fit, and more of them the less the first keeps."""
    edge = [max(fits_from[first:]) for first in range(4)]  # 4: none fits
    tries = []

    def tried(first, second):
        tries.append((first, second))
        return f"{first}{second}" if "abcd".index(second) >= edge["abcd".index(first)] else None

    wanted = {
        ("abcd"[first], "abcd"[edge[first]]): f"{'abcd'[first]}{'abcd'[edge[first]]}"
        for first in range(4)
        if edge[first] < 4 and edge[first] not in edge[:first]
    }
    assert frontier("abcd", tried) == wanted
    assert len(tries) == len(set(tries)) <= 8


def test_rows_at_once_are_tried_that_divide_a_device_s_share():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


def test_a_slice_of_more_machines_than_virtual_shards_is_refused():
    config = aot.TrainConfig.from_config_dict(stage1.get_config().to_dict())
    aot.check_machines(config, slices.find("v5e-256"))
    with pytest.raises(UserError, match="has 128 machines .* give --config.data.virtual_shards=128"):
        aot.check_machines(config, slices.find("2xv5e-256"))


def test_a_search_tells_first_what_computes_least_again(monkeypatch, capsys):
    """With memory that holds what two policies of the decoder keep, or all of the tower's, and three rows of six."""
    kept_bytes = {"none": 4, "linear": 3, "attention": 1, "full": 0}

    def peak(arguments, kept, rows):
        assert arguments == ["its own"]
        wanted = (2 * kept_bytes[kept[0]] + kept_bytes[kept[1]]) * rows
        return wanted if wanted <= 7 else None

    monkeypatch.setattr(aot, "_peak", peak)
    config = recipe(8)
    config.data.shape.rows = 6 * 8
    found = aot.search(config, "v5e-8", ["its own"])
    assert found == {"rows_a_device_linear_attention": 1, "rows_a_device_attention_none": 1}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["remat", "vision_remat", "rows_a_device"]
    operations = [float(line.split()[-1]) for line in lines[2:]]
    assert operations == sorted(operations)
    assert len(operations) == 2


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
