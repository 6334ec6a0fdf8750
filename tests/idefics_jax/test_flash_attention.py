"""The TPU's attention kernel: interpreted against XLA, the blocks it computes, and compiled for TPUs that are not here.

Interpreted, blocks of 128 stand for those of 256, so that short rows have several.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from idefics_jax import flash_attention, sharding
from idefics_jax.attention import attend
from idefics_jax.stack import REMAT_POLICIES
from idefics_jax.visibility import Visibility
from launch import program
from tests.idefics_jax import reference


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(flash_attention, "BLOCK", 128)


def packed(*rows: list[int], length: int) -> tuple[jax.Array, jax.Array]:
    """Returns segments and positions of rows of documents of these lengths, padded at the end."""
    segments, positions = np.zeros((2, len(rows), length), np.int32)
    for row, lengths in enumerate(rows):
        end = 0
        for i, size in enumerate(lengths):
            segments[row, end : end + size] = i + 1
            positions[row, end : end + size] = np.arange(size)
            end += size
    return jnp.asarray(segments), jnp.asarray(positions)


def images() -> Visibility:
    """An image over a boundary of blocks, a block of padding, and ids that do not come in order."""
    segments, _ = packed([100, 60, 90], [30, 250], length=384)
    segments = jnp.array([0, 3, 1, 2])[segments]
    return Visibility(segments, segments)


def documents(window: int | None) -> Visibility:
    segments, positions = packed([200, 20, 70], [5, 190], length=290)
    return Visibility(segments, segments, positions, positions, window)


def latents() -> Visibility:
    """Three latents an image see its patches, wherever they lie, and one another."""
    patches, _ = packed([100, 40, 130], [20, 20, 30], length=270)
    patches = jnp.array([0, 2, 3, 1])[patches]
    owners = jnp.tile(jnp.repeat(jnp.arange(1, 4), 3), (2, 1))
    return Visibility(owners, jnp.concatenate([patches, owners], axis=1))


# Query heads, key heads, numbers a head; most heads a step of the kernel.
CASES = {
    "vision, head_dim 72": (images, (4, 4, 72), 8),
    "decoder, a group of heads a step": (lambda: documents(None), (4, 2, 16), 8),
    "decoder with a window, part of a group a step": (lambda: documents(50), (4, 1, 16), 1),
    "resampler, several groups a step": (latents, (8, 4, 8), 8),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [*((name, jnp.float32, 1e-5) for name in CASES), (next(iter(CASES)), jnp.bfloat16, 2e-2)],
)
def test_the_kernel_and_its_gradients_are_those_of_xla(name, dtype, tolerance, monkeypatch):
    """Errors are in parts of the largest number; what a query that sees nothing gets is meaningless on both sides."""
    make, (heads, kv_heads, head_dim), step = CASES[name]
    monkeypatch.setattr(flash_attention, "HEADS", step)
    seen, rng = make(), np.random.default_rng(0)
    (rows, length), keys = seen.query_segments.shape, seen.key_segments.shape[1]
    shapes = (rows, length, heads), (rows, keys, kv_heads), (rows, keys, kv_heads)
    inputs = [jnp.asarray(rng.normal(size=(*shape, head_dim)), dtype) for shape in shapes]
    weight = rng.normal(size=(*shapes[0], head_dim))
    weight *= (seen.query_segments > 0)[..., None, None]

    def compute(fn):
        def score(*x):
            out = fn(*x) * jnp.asarray(weight, jnp.float32)
            return jnp.sum(out), out

        return reference.jit(jax.value_and_grad(score, argnums=(0, 1, 2), has_aux=True))(*inputs)

    (_, ours), gradients = compute(lambda *x: flash_attention.flash_attention(*x, seen, interpret=True))
    (_, theirs), expected = compute(lambda *x: attend(*x, seen))
    for a, b in zip((ours, *gradients), (theirs, *expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.usefixtures("small_blocks")
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient():
    segments = jnp.zeros((1, 200), jnp.int32).at[0, :20].set(1)
    x = jnp.ones((1, 200, 1, 8))

    def score(x):
        out = flash_attention.flash_attention(x, x, x, Visibility(segments, segments), interpret=True)
        return jnp.sum(out**2), out

    gradient, out = reference.jit(jax.grad(score, has_aux=True))(x)
    np.testing.assert_allclose(out[0, :, 0, 0], segments[0], rtol=1e-6)
    assert (gradient[0, 20:] == 0).all()
    assert (gradient[0, :20] != 0).all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("make", [images, lambda: documents(None), lambda: documents(50), latents])
def test_the_blocks_computed_are_those_that_hold_a_visible_pair(make):
    """None is missed, and where a segment lies in one piece none is computed for nothing."""
    seen = make()
    mask = np.asarray(seen.mask(seen.query_segments, seen.query_positions))
    rows, length, keys = mask.shape
    mask = np.pad(mask, ((0, 0), (0, -length % 128), (0, -keys % 128)))
    wanted = mask.reshape(rows, mask.shape[1] // 128, 128, -1, 128).any((2, 4))
    active = np.asarray(flash_attention.active_blocks(seen))
    assert active[wanted].all()
    assert active.sum() == wanted.sum()


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("name", ["v5e-8", "v4-8", "v5p-8"])
def test_the_kernel_is_compiled_for_each_tpu_and_sends_nothing(name):
    """Head dim 72, rows over `data` and heads over `tensor`."""
    rules, devices = sharding.RULES["fsdp_tensor"], program.slice_devices(name)
    names = ("act_batch", None, "vision_heads", None)

    def gradients(q, k, v, segments):
        seen = Visibility(segments, segments)
        return jax.grad(lambda *x: jnp.sum(attend(*x, seen, names[2:3] * 2).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    with sharding.use_mesh(sharding.make_mesh({"data": -1, "tensor": 2}, devices), rules) as mesh:
        rows = mesh.shape["data"]
        x, ids = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharding.spec(axes, rules)))
            for shape, dtype, axes in (
                ((rows, 729, 4, 72), jnp.bfloat16, names),
                ((rows, 729), jnp.int32, names[:2]),
            )
        )
        text = jax.jit(gradients).lower(x, x, x, ids).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert not re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(", text)


@pytest.mark.usefixtures("small_blocks")
def test_rows_that_cannot_be_listed_together_are_computed_in_turn(monkeypatch):
    seen = images()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*seen.query_segments.shape, 2, 8)), jnp.float32)
    together = flash_attention.flash_attention(x, x, x, seen, interpret=True)
    monkeypatch.setattr(flash_attention, "MAX_PAIRS", 10)
    np.testing.assert_allclose(flash_attention.flash_attention(x, x, x, seen, interpret=True), together, atol=1e-6)
    monkeypatch.setattr(flash_attention, "MAX_PAIRS", 8)
    with pytest.raises(ValueError, match="384 queries to 384 keys has more than 8 pairs of blocks of 128"):
        flash_attention.flash_attention(x, x, x, seen, interpret=True)


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_the_forward_kernel_runs_once_where_a_policy_keeps_its_result():
    mesh = sharding.make_mesh({}, program.slice_devices("v5e-8")[:1])
    x, segments = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        for shape, dtype in (((1, 256, 2, 8), jnp.bfloat16), ((1, 256), jnp.int32))
    )

    def kernels(remat):
        def attention(x, segments):
            # Without the sine the result of the checkpoint would itself be kept.
            return jnp.sin(attend(x, x, x, Visibility(segments, segments)).astype(jnp.float32))

        kept = jax.checkpoint(attention, policy=REMAT_POLICIES[remat])
        with sharding.use_mesh(mesh, sharding.RULES["data"]):
            gradient = jax.jit(jax.grad(lambda x, segments: jnp.sum(kept(x, segments) ** 2)))
            return gradient.lower(x, segments).compile().as_text().count('custom_call_target="tpu_custom_call"')

    assert (kernels("full"), kernels("linear"), kernels("attention")) == (3, 2, 2)


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("kv_heads", [8, 32])
def test_a_7b_decoders_gradient_has_room_in_vector_memory_with_and_without_shared_keys(kv_heads):
    mesh = sharding.make_mesh({}, program.slice_devices("v5e-8")[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    query, key = (jax.ShapeDtypeStruct((1, 4096, n, 128), jnp.bfloat16, sharding=whole) for n in (32, kv_heads))
    segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32, sharding=whole)

    def loss(query, key, value, segments):
        return jnp.sum(attend(query, key, value, Visibility(segments, segments)).astype(jnp.float32))

    with sharding.use_mesh(mesh, sharding.RULES["data"]):
        cost = program.cost(jax.grad(loss, argnums=(0, 1, 2)), query, key, key, segments)
    assert {one.name for one in cost.kernels} == {"flash_attention_forward", "flash_attention_backward"}
