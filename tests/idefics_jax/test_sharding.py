"""The mesh and the rules, and the model on 8 devices against the model on one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from idefics_jax.sharding import RULES, batch_sharding, constrain, make_mesh, spec, use_mesh

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def eight_devices() -> subprocess.CompletedProcess:
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags += " --xla_cpu_use_fusion_emitters=false"  # all three: compile fast
    # A program out of the cache is not compiled, and XLA has nothing to say of it.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "tests.idefics_jax.sharded"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("preset", RULES)
def test_sharded_logits_and_gradients_are_the_unsharded(preset, eight_devices):
    found = json.loads(eight_devices.stdout)[preset]
    assert found["devices"] == 8
    assert found["constraints"] > 0
    assert found["error of logits"] <= 1e-5
    assert {path: error for path, error in found["error of gradients"].items() if error > 1e-5} == {}


@pytest.mark.parametrize(
    ("preset", "kernel", "rows"), [("data", [2, 16, 24], 1), ("fsdp", [2, 4, 24], 1), ("fsdp_tensor", [2, 8, 12], 2)]
)
def test_a_device_holds_its_share(preset, kernel, rows, eight_devices):
    found = json.loads(eight_devices.stdout)[preset]
    assert found["kernel"] == [2, 16, 24]
    assert found["kernel on a device"] == kernel
    assert found["logits on a device"][0] == rows


def test_nothing_is_copied_to_every_device_for_want_of_a_layout(eight_devices):
    """XLA says so where it must undo one layout entirely to reach another."""
    assert "full rematerialization" not in eight_devices.stderr


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
    assert spec(("act_batch", None), RULES["data"]) == PartitionSpec(("data", "fsdp"), None)


def test_a_constraint_is_in_the_program_inside_the_mesh_alone():
    def lowered():
        return jax.jit(lambda x: constrain(x, ("act_batch", "act_embed"))).lower(jnp.ones((2, 2))).as_text()

    assert "sharding_constraint" not in lowered()
    with use_mesh(make_mesh({}, jax.devices()[:1]), RULES["data"]):
        assert "sharding_constraint" in lowered()


def test_a_mesh_of_one_device_takes_a_batch():
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    assert mesh.shape == {"data": 1, "fsdp": 1, "tensor": 1}
    assert jax.device_put(jnp.ones((3, 2)), batch_sharding(mesh)).sharding.mesh.size == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 1}, "mesh axis 'model' is unknown; the axes are data, fsdp, tensor"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "whole numbers of at least 1"),
        ({"data": 3}, "do not fit 1 device"),
        ({"data": -1, "tensor": 2}, "do not fit 1 device"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes, jax.devices()[:1])
