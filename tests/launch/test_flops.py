"""The operations an algorithm needs, against those of the program as it is traced, on rows without padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idefics_jax.batch import BatchShape, batch_spec
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.param_transforms import lora, partition
from idefics_jax.param_tree import param_shapes
from idefics_jax.training.step import batch_sums
from launch.flops import Trained, Work, step_flops
from launch.traced import traced_flops
from launch.workload import Rows, full_rows, packed_rows
from tests.idefics_jax import tiny

# As many patches, latents and tokens a row as there are pairs of nothing unseen but the causal half.
SHAPE = BatchShape(rows=1, tokens=32, vision_rows=1, patches=16, images=1, patch_dim=48)
ADAPTERS = (lora.LoraTarget("(vision_model/encoder|text_model/layers)/.*_proj", 3, 8.0, 0.0, dora=False),)
# What trains besides adapters: nothing, the connector, everything.
CONNECTOR = "connector/.*"


def traced(trained: str | None, adapters: tuple) -> tuple[float, Trained]:
    """Returns the operations of the gradients of a tiny model as traced, and what trains."""
    params = param_shapes(tiny.CONFIG)
    own = jax.eval_shape(lambda tree: lora.init(tree, adapters, jax.random.key(0)), params) if adapters else {}
    rules = [partition.Rule(".*/lora_.*", "trainable")] if adapters else []
    rules += [partition.Rule(trained, "trainable")] if trained else []
    rules += [partition.Rule(".*", "frozen")] if trained != ".*" else []
    chosen = partition.choose(params, own, rules)
    base, frozen = partition.split(params, chosen)

    def loss(trainable, frozen, batch):
        variables = {"params": partition.combine(trainable["params"], frozen), "adapters": trainable["adapters"]}
        return batch_sums(Idefics2(tiny.CONFIG), variables, batch, chunk=SHAPE.tokens, rngs={})["loss"]

    trainable = {"params": base, "adapters": own}
    jaxpr = jax.jit(jax.grad(loss)).trace(trainable, frozen, batch_spec(SHAPE)).jaxpr
    return traced_flops(jaxpr), Trained.of(trainable)


@pytest.mark.parametrize(
    ("trained", "adapters"),
    [(".*", ()), (CONNECTOR, ()), (CONNECTOR, ADAPTERS), (None, ADAPTERS)],
    ids=["full", "connector", "connector and LoRA", "LoRA"],
)
def test_what_an_algorithm_needs_is_what_its_program_multiplies_where_nothing_is_padded_or_masked(trained, adapters):
    done, what = traced(trained, adapters)
    # Every pair of tokens is computed by the program, though half of them are masked.
    work = Work(tokens=32, patches=16, images=1, text_pairs=32 * 32, vision_pairs=16 * 16)
    needed = sum(step_flops(tiny.CONFIG, work, what).values())
    # A scanned stack makes the gradient to its first layer's input whether it is wanted or not.
    assert needed == pytest.approx(done, rel=0.02)
    assert needed <= done


def test_rows_count_pairs_within_images_and_documents_alone():
    rows = Rows(
        segment_ids=np.array([[1, 1, 1, 2, 2, 0]]),
        positions=np.array([[0, 1, 2, 0, 1, 0]]),
        patch_image_ids=np.array([[[1, 1, 2, 0], [3, 3, 3, 0]]]),
    )
    expected = Work(tokens=10, patches=12, images=6, text_pairs=2 * (6 + 3), vision_pairs=2 * (4 + 1 + 9))
    assert rows.work(2, window=None) == expected
    assert rows.work(2, window=2) == dataclasses.replace(expected, text_pairs=2 * (5 + 3))


def test_a_row_that_is_full_holds_one_document():
    work = full_rows(SHAPE).work(3, window=None)
    assert work == Work(tokens=96, patches=48, images=3, text_pairs=3 * 32 * 33 / 2, vision_pairs=3 * 256)


def test_the_mixture_of_a_recipe_fills_its_rows():
    from configs.idefics2_8b import stage1

    rows = packed_rows(stage1.get_config(), rows=64)
    assert all(share > 0.9 for share in rows.fill)
    # Images of stage 1 all have 27 x 27 patches.
    work = rows.work(1, window=4096)
    assert work.vision_pairs == work.images * 729**2
    assert work.patches == work.images * 729
    assert work.tokens < work.text_pairs < work.tokens * 2048


def test_products_in_loops_branches_and_calls_are_counted_as_often_as_they_run():
    def f(x, kernels):
        y, _ = jax.lax.scan(lambda y, k: (jax.jit(jnp.matmul)(y, k), None), x, kernels)
        return jax.lax.cond(y.sum() > 0, lambda: y @ y.T @ y, lambda: y)

    x, kernels = jax.ShapeDtypeStruct((8, 4), jnp.float32), jax.ShapeDtypeStruct((5, 4, 4), jnp.float32)
    assert traced_flops(jax.jit(f).trace(x, kernels).jaxpr) == 2 * (5 * 8 * 4 * 4 + 2 * 8 * 8 * 4)
