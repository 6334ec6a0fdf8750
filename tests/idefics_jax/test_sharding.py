"""The mesh and the rules, and the model on 8 devices against the model on one."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from idefics_jax.param_transforms import lora, paths
from idefics_jax.param_tree import abstract_params
from idefics_jax.sharding import RULES, batch_sharding, constrain, make_mesh, spec, table, use_mesh
from tests.idefics_jax import sharded, tiny

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def eight_devices() -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.idefics_jax.sharded"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


CELLS = [f"{mesh} {adaptation}" for mesh in sharded.MESHES for adaptation in sharded.ADAPTATIONS]


@pytest.mark.timeout(1200)  # the first of them waits for twenty programs to be compiled
@pytest.mark.parametrize("cell", CELLS)
def test_three_steps_on_eight_devices_are_those_of_one(cell, eight_devices):
    found = json.loads(eight_devices.stdout)[cell]
    assert found["constraints"] > 0
    assert found["error of loss"] <= 1e-5
    assert {path: error for path, error in found["error of gradients"].items() if error > 1e-5} == {}
    assert {path: error for path, error in found["error of parameters"].items() if error > 1e-5} == {}


@pytest.mark.parametrize("cell", CELLS)
def test_between_devices_passes_what_the_preset_promises(cell, eight_devices):
    """Sums, and parameters where they are cut; never logits, patches or rows of the batch."""
    mesh, adaptation = cell.split()
    preset, sizes = sharded.MESHES[mesh]
    passed: dict[str, set] = {}
    for kind, shapes in json.loads(eight_devices.stdout)[cell]["collectives"]:
        passed.setdefault(kind, set()).update(sides(shape) for shape in shapes.split(", "))
    summed = passed.pop("all-reduce")
    whole_and_cut = (parameters(RULES[preset], sizes, cut=cut) for cut in ("tensor", "fsdp", "fsdp tensor"))
    promised = set.union({()}, *whole_and_cut)
    if adaptation == "dora" and preset != "data":
        promised.add((2, 2))  # A^T A of each layer, where the rows of A are cut
    if preset == "fsdp_tensor":
        promised |= PARTIAL_SUMS
    assert summed
    assert summed <= promised
    assert bool(passed.get("all-gather")) == (preset != "data")
    gathered = parameters(RULES[preset], sizes, cut="tensor")
    if preset == "fsdp_tensor":
        # Parts that are cut both ways are exchanged where one way is to be undone; so is the head's gradient, whose
        # columns were shared out with the logits.
        gathered |= parameters(RULES[preset], sizes, cut="fsdp tensor")
        assert passed.pop("collective-permute") | passed.pop("all-to-all", set()) <= gathered
        # The tiny resampler has one key head for two devices: its keys and values, [2 rows, 1, 48, 8], go to both.
        gathered.add((2, 8, 48))
    assert passed.pop("all-gather", set()) <= gathered
    assert passed.pop("reduce-scatter", set()) <= parameters(RULES[preset], sizes, cut="fsdp tensor")
    assert passed == {}


# What each of two devices adds to the products of the 2 rows that they share (40 tokens, 2 x 20 patches, 8 latents, of
# 16 numbers): of decoder, tower and resampler, what enters LoRA's B, and the resampler's keys and values.
PARTIAL_SUMS = {(2, 16, 40), (4, 16, 20), (2, 16, 16), (2, 2, 40), (2, 4, 20), (2, 8, 48), (2, 16, 48)}


def sides(shape: str) -> tuple[int, ...]:
    """The sides of f32[1,16,24], in order of size, without those of 1."""
    return tuple(sorted(int(side) for side in re.findall(r"\d+(?=[,\]])", shape) if int(side) > 1))


def parameters(rules: dict, sizes: dict[str, int], *, cut: str) -> set[tuple[int, ...]]:
    """What a device may hold of parameters and adapters, one layer or all, if only some mesh axes cut them."""
    shapes, axes = abstract_params(tiny.CONFIG)
    target = (lora.LoraTarget(sharded.ADAPTERS, 2, 4.0, 0.0, dora=True),)
    adapters = jax.eval_shape(lambda tree: lora.init(tree, target, jax.random.key(0)), shapes)
    found = set()
    for tree, names in ((shapes, axes), (adapters, lora.axes(axes, adapters))):
        flat = paths.flatten(names)
        for path, leaf in paths.flatten(tree).items():
            by = [sizes.get(axis, 1) if axis in cut.split() else 1 for axis in spec(flat[path], rules)]
            own = [side // ways for side, ways in zip(leaf.shape, by, strict=True)]
            # Linears that read the same input have their A side by side: q, k and v, gate and up.
            joined = [[*own[:-1], own[-1] * count] for count in (2, 3)] if path.endswith("lora_A") else []
            found |= {
                tuple(sorted(side for side in part if side > 1))
                for whole in (own, *joined)
                for part in (whole, whole[1:])
            }
    return found


@pytest.mark.parametrize(
    ("mesh", "kernel"),
    [("data", [2, 16, 24]), ("fsdp", [2, 4, 24]), ("fsdp_tensor", [2, 8, 12]), ("slices", [2, 4, 24])],
)
def test_a_device_holds_its_share(mesh, kernel, eight_devices):
    assert json.loads(eight_devices.stdout)[f"{mesh} full"]["kernel on a device"] == kernel


def test_the_table_at_the_start_says_where_each_leaf_lies_and_what_it_takes():
    mesh = make_mesh({}, jax.devices()[:1])
    leaves = {"a/kernel": jax.ShapeDtypeStruct((1024, 512), jnp.float32), "b/scale": jnp.ones(256, jnp.bfloat16)}
    said = table(mesh, leaves, {"a/kernel": ("embed", "mlp"), "b/scale": (None,)}, RULES["fsdp_tensor"])
    assert [line.split() for line in said.splitlines()[1:3]] == [
        ["a/kernel", "1024x512", "embed,", "mlp", "fsdp,", "tensor", "2.000"],
        ["b/scale", "256", "-", "-", "0.000"],
    ]
    assert said.endswith("2.0 MiB on each of 1 device(s): slice 1, data 1, fsdp 1, tensor 1")


def test_an_unknown_logical_name_is_refused():
    with pytest.raises(ValueError, match="logical axis 'width' is not in the sharding rules; add it"):
        spec(("layers", "width"), RULES["fsdp"])
    with (
        use_mesh(make_mesh({}, jax.devices()[:1]), RULES["data"]),
        pytest.raises(ValueError, match="logical axis 'width'"),
    ):
        constrain(jnp.ones((2, 2)), ("act_batch", "width"))


@pytest.mark.parametrize("names", [("embed", "vision_embed"), ("embed", "embed"), ("act_batch", "embed")])
def test_two_dims_on_one_mesh_axis_are_refused(names):
    with pytest.raises(ValueError, match="both map to mesh axis 'fsdp'; change one of the two"):
        spec(names, RULES["fsdp"])


def test_names_become_mesh_axes():
    assert spec(("layers", "embed", "mlp"), RULES["fsdp_tensor"]) == PartitionSpec(None, "fsdp", "tensor")
    assert spec(("act_batch", None), RULES["data"]) == PartitionSpec(("slice", "data", "fsdp"), None)


def test_a_constraint_is_in_the_program_inside_the_mesh_alone():
    def lowered():
        return jax.jit(lambda x: constrain(x, ("act_batch", "act_embed"))).lower(jnp.ones((2, 2))).as_text()

    assert "sharding_constraint" not in lowered()
    with use_mesh(make_mesh({}, jax.devices()[:1]), RULES["data"]):
        assert "sharding_constraint" in lowered()


def test_a_mesh_of_one_device_takes_a_batch():
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    assert mesh.shape == {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1}
    assert jax.device_put(jnp.ones((3, 2)), batch_sharding(mesh)).sharding.mesh.size == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 1}, "mesh axis 'model' is unknown; the axes are slice, data, fsdp, tensor"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "whole numbers of at least 1"),
        ({"data": 3}, "do not fit 1 device"),
        ({"data": -1, "tensor": 2}, "do not fit 1 device"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes, jax.devices()[:1])
