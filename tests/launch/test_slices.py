"""Slices are what Google's pages say."""

import pytest

from idefics_jax.errors import UserError
from launch.slices import SLICES, find

# Name, the Cloud TPU API's name, GKE's accelerator label, topology, machine type, machines, chips a machine. Machines
# of v5e and v4 up to 128 as in the table of GoogleCloudPlatform/applied-ai-engineering-samples,
# ai-infrastructure/saxml-on-gke/README.md; the others as in AI-Hypercomputer/xpk, core/system_characteristics.py.
PUBLISHED = [
    ("v4-8", "v4-8", "tpu-v4-podslice", "2x2x1", "ct4p-hightpu-4t", 1, 4),
    ("v4-16", "v4-16", "tpu-v4-podslice", "2x2x2", "ct4p-hightpu-4t", 2, 4),
    ("v4-32", "v4-32", "tpu-v4-podslice", "2x2x4", "ct4p-hightpu-4t", 4, 4),
    ("v4-64", "v4-64", "tpu-v4-podslice", "2x4x4", "ct4p-hightpu-4t", 8, 4),
    ("v4-128", "v4-128", "tpu-v4-podslice", "4x4x4", "ct4p-hightpu-4t", 16, 4),
    ("v4-256", "v4-256", "tpu-v4-podslice", "4x4x8", "ct4p-hightpu-4t", 32, 4),
    ("v4-512", "v4-512", "tpu-v4-podslice", "4x8x8", "ct4p-hightpu-4t", 64, 4),
    ("v5p-8", "v5p-8", "tpu-v5p-slice", "2x2x1", "ct5p-hightpu-4t", 1, 4),
    ("v5p-16", "v5p-16", "tpu-v5p-slice", "2x2x2", "ct5p-hightpu-4t", 2, 4),
    ("v5p-32", "v5p-32", "tpu-v5p-slice", "2x2x4", "ct5p-hightpu-4t", 4, 4),
    ("v5p-64", "v5p-64", "tpu-v5p-slice", "2x4x4", "ct5p-hightpu-4t", 8, 4),
    ("v5p-128", "v5p-128", "tpu-v5p-slice", "4x4x4", "ct5p-hightpu-4t", 16, 4),
    ("v5p-256", "v5p-256", "tpu-v5p-slice", "4x4x8", "ct5p-hightpu-4t", 32, 4),
    ("v5p-512", "v5p-512", "tpu-v5p-slice", "4x8x8", "ct5p-hightpu-4t", 64, 4),
    ("v5e-8", "v5litepod-8", "tpu-v5-lite-podslice", "2x4", "ct5lp-hightpu-8t", 1, 8),
    ("v5e-16", "v5litepod-16", "tpu-v5-lite-podslice", "4x4", "ct5lp-hightpu-4t", 4, 4),
    ("v5e-32", "v5litepod-32", "tpu-v5-lite-podslice", "4x8", "ct5lp-hightpu-4t", 8, 4),
    ("v5e-64", "v5litepod-64", "tpu-v5-lite-podslice", "8x8", "ct5lp-hightpu-4t", 16, 4),
    ("v5e-128", "v5litepod-128", "tpu-v5-lite-podslice", "8x16", "ct5lp-hightpu-4t", 32, 4),
    ("v5e-256", "v5litepod-256", "tpu-v5-lite-podslice", "16x16", "ct5lp-hightpu-4t", 64, 4),
]


def test_every_slice_is_as_published():
    told = [
        (s.name, s.accelerator_type, s.gke_accelerator, s.topology, s.machine_type, s.hosts, s.chips_per_host)
        for s in SLICES.values()
    ]
    assert sorted(told) == sorted(PUBLISHED)


def test_several_slices_are_named_with_their_count():
    two = find("2xv5e-256")
    assert (two.count, two.chips, two.hosts, two.name) == (2, 256, 64, "2xv5e-256")
    assert find("v5p-128").name == "v5p-128"


@pytest.mark.parametrize("name", ["v5e-257", "v6e-8", "0xv5e-8", "xv5e-8", "", "2x", "2x2xv5e-8", "-1xv4-8"])
def test_unknown_slices_are_refused(name):
    with pytest.raises(UserError, match="is unknown; choose one of v4-8"):
        find(name)
