"""Programs compiled for described TPU slices: cycles with loops multiplied out, memory, and refusals in a sentence."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from idefics_jax import sharding
from idefics_jax.errors import UserError
from idefics_jax.training.run import jitted
from launch import program

PROGRAM = """\
HloModule jit_f

%fused (p: f32[8]) -> f32[8] {
  ROOT %inner = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"7"}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(4)
  %c = pred[] compare(%p, %bound), backend_config={"estimated_cycles":"1"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %start = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"20"}
  %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body NOTE
}
"""


@pytest.mark.parametrize(("note", "trips"), [("", 4), (', backend_config={"known_trip_count":{"n":"5"}}', 5)])
def test_the_body_of_a_loop_counts_as_often_as_it_runs_and_a_fusion_once(note, trips):
    operations = program.Text(PROGRAM.replace(" NOTE", note)).operations()
    assert sum(one.cycles for one in operations) == 20 + trips * 100


def test_a_loop_that_does_not_tell_its_trips_is_an_error():
    with pytest.raises(ValueError, match="number of trips of a loop cannot be told"):
        program.Text(PROGRAM.replace(" NOTE", "").replace("constant(4)", "parameter(1)"))


@pytest.mark.parametrize("name", ["v4-8", "v5e-8", "v5p-8"])
def test_twice_the_layers_of_a_scan_are_estimated_at_twice_the_cycles(name):
    mesh = sharding.make_mesh({"fsdp": -1}, program.slice_devices(name))
    spread, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((mesh.size * 256, 512), jnp.bfloat16, sharding=spread)

    def scanned(x, kernels):
        return jax.lax.scan(lambda y, kernel: (jnp.tanh(y @ kernel), None), x, kernels)[0]

    few, many = (
        program.cost(scanned, x, jax.ShapeDtypeStruct((layers, 512, 512), jnp.bfloat16, sharding=whole))
        for layers in (32, 64)
    )
    assert 1.8 < many.cycles / few.cycles < 2.1
    assert few.argument_bytes == pytest.approx(2 * (256 * 512 + 32 * 512 * 512), rel=0.01)
    assert few.peak_bytes >= few.argument_bytes


def test_what_does_not_fit_is_said_in_a_sentence():
    mesh = sharding.make_mesh({"fsdp": -1}, program.slice_devices("v5e-8"))
    whole = jax.ShapeDtypeStruct((2**17, 2**17), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(UserError, match="it does not fit: Ran out of memory"):
        program.cost(lambda x: x + 1, whole)


def test_an_unknown_slice_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="slice 'v5p-7' is unknown; choose one of v4-8"):
        program.slice_devices("v5p-7")


# What a gather is in a program that runs it beside two products: its start, two pieces and its done hold it alike.
IN_PIECES = """\
HloModule jit_f

%start (p: bf16[64,8]) -> bf16[64,128] {
  %gather.1 = bf16[64,128]{1,0} all-gather(%p), channel_id=3, replica_groups=[4,16]<=[64], dimensions={1}
  ROOT %begun = bf16[64,128]{1,0} custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece (p: bf16[64,8]) -> bf16[64,128] {
  ROOT %gather.2 = bf16[64,128]{1,0} all-gather(%p), channel_id=3, replica_groups=[4,16]<=[64], dimensions={1}
}

%done (p: bf16[64,8]) -> bf16[64,128] {
  %gather.3 = bf16[64,128]{1,0} all-gather(%p), channel_id=3, replica_groups=[4,16]<=[64], dimensions={1}
  ROOT %ended = bf16[64,128]{1,0} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[64,8]) -> bf16[64,128] {
  %a = bf16[64,128]{1,0} fusion(%x), kind=kLoop, calls=%start
  %b = bf16[64,128]{1,0} fusion(%a), kind=kOutput, calls=%piece, backend_config={"estimated_cycles":"300"}
  %between = bf16[64,128]{1,0} add(%a, %a), backend_config={"estimated_cycles":"1000"}
  %c = bf16[64,128]{1,0} fusion(%b), kind=kOutput, calls=%piece, backend_config={"estimated_cycles":"40"}
  %d = bf16[64,128]{1,0} fusion(%c), kind=kLoop, calls=%done, backend_config={"estimated_cycles":"2"}
  %sent = (bf16[64]{0}, bf16[64]{0}) collective-permute-start(%d), channel_id=4, source_target_pairs={{0,1}}
  %e = bf16[64]{0} add(%d, %d), backend_config={"estimated_cycles":"7"}
  %got = bf16[64]{0} collective-permute-done(%sent)
  ROOT %last = bf16[64,1024]{1,0} all-gather(%got), channel_id=5, replica_groups=[4,16]<=[64], dimensions={1}
}
"""


def test_a_collective_in_pieces_counts_once_with_the_cycles_of_what_carries_it_on():
    found = {
        (one.kind, one.bytes, one.devices): (one.count, one.beside) for one in program.Text(IN_PIECES).collectives()
    }
    assert found == {
        ("all-gather", 64 * 1024 * 2, 16): (1, 0),
        ("all-gather", 64 * 128 * 2, 16): (1, 342),
        ("collective-permute", 64 * 2, 2): (1, 7),
    }


def test_on_a_tpu_a_step_gathers_the_next_kernels_while_it_multiplies():
    mesh = sharding.make_mesh({"data": -1, "fsdp": 16}, program.slice_devices("v5p-128"))
    rows, cut = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((("data", "fsdp"),), (None, "fsdp")))
    x = jax.ShapeDtypeStruct((mesh.size * 2, 512, 1024), jnp.bfloat16, sharding=rows)
    kernels = [jax.ShapeDtypeStruct((4, 1024, 1024), jnp.bfloat16, sharding=cut)] * 2

    def step(x, kernels, batch):
        return jax.lax.scan(lambda y, pair: (jnp.tanh(jnp.tanh(y @ pair[0]) @ pair[1]), None), x, kernels)[0], batch

    cost = program.compiled_cost(jitted(step, rows, mesh).lower(x, kernels, jnp.ones(())), {})
    gathered = {one.beside > 0: one.count for one in cost.collectives if one.kind == "all-gather"}
    assert gathered == {True: 4, False: 4}, "a layer's second kernel comes beside its first product"


def test_collectives_are_told_with_their_groups_and_what_each_device_ends_with():
    mesh = sharding.make_mesh({"data": -1, "fsdp": 16}, program.slice_devices("v5p-128"))
    rows, cut = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((("data", "fsdp"),), (None, "fsdp")))
    x = jax.ShapeDtypeStruct((mesh.size * 2, 512, 1024), jnp.bfloat16, sharding=rows)
    kernels = jax.ShapeDtypeStruct((4, 1024, 1024), jnp.bfloat16, sharding=cut)

    def loss(kernels, x):
        return jnp.sum(jax.lax.scan(lambda y, kernel: (jnp.tanh(y @ kernel), None), x, kernels)[0].astype(jnp.float32))

    cost = program.cost(jax.grad(loss), kernels, x, out_shardings=cut)
    found = {(one.kind, one.devices, one.bytes): one.count for one in cost.collectives}
    whole = 1024 * 1024 * 2
    assert found[("all-gather", 16, whole)] == 8, "each kernel is gathered forward and backward"
    assert found[("reduce-scatter", 16, whole // 16)] == 4, "each gradient is summed where its part of the kernel lies"
    assert found[("all-reduce", 4, whole // 16)] == 4, "and then over the groups along data"
