"""The pairs that the benchmark of vision attention counts, against masks, and the kernel's schedule."""

import numpy as np

from benchmarks import kernel_schedule, vision_attention
from configs.idefics2_8b import instruct
from idefics_jax.visibility import Visibility
from launch import workload


def test_the_vision_tower_computes_at_most_1_3_times_what_it_needs():
    """In the stage whose images are smallest beside their rows."""
    config = instruct.get_config()
    of = vision_attention.pairs(workload.packed_rows(config), config.data.shape.images)["vision tower"]
    assert 1.0 <= of.blocks / of.needed <= 1.3


def test_needed_pairs_are_those_of_the_masks():
    segments, positions = np.zeros((2, 1, 300), np.int32)
    segments[0, :200], positions[0, :200] = 1, np.arange(200)
    segments[0, 200:290], positions[0, 200:290] = 2, np.arange(90)
    images = np.zeros((1, 2, 60), np.int32)
    images[0, 0, :50], images[0, 1, :20], images[0, 1, 20:60] = 2, 1, 3
    found = vision_attention.pairs(workload.Rows(segments, positions, images), most_images=4)
    seen = Visibility(images[0], images[0])
    assert found["vision tower"].needed == seen.mask(seen.query_segments, None).sum()
    seen = Visibility(segments, segments, positions, positions, vision_attention.WINDOW)
    assert found["decoder"].needed == seen.mask(segments, positions).sum()
    assert found["resampler"].needed == 64 * (50 + 20 + 40 + 3 * 64)


def test_a_block_of_the_backward_kernel_is_scheduled_at_more_cycles_than_one_of_the_forward():
    found = kernel_schedule.of("v5e-8", kernel_schedule.Shape(512, 512, 4, 4, 72))
    for cycles in found.values():
        assert 100 < cycles.least < cycles.most
    assert 1.5 < found["backward"].least / found["forward"].least < 3
