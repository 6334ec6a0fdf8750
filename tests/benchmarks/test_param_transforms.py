"""What adapting must not cost: no gradient of a frozen kernel, nothing of a kernel's shape for DoRA's norms."""

import dataclasses
import re

import jax
import pytest

from benchmarks import param_transforms
from benchmarks.param_transforms import block_gradients

# Sizes that no two arrays share by chance.
SMALL = dataclasses.replace(
    param_transforms.MODEL.text_config,
    hidden_size=176,
    intermediate_size=336,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=52,
)
KERNELS = ((176, 208), (176, 104), (208, 176), (176, 336), (336, 176))


def made(variant):
    """Returns the shapes that the compiled gradients of a layer make, as {(shape, operation)}, fused ones apart."""
    gradients, arguments = block_gradients(variant, SMALL)
    program = jax.jit(gradients).lower(*arguments).compile().as_text()
    found = set()
    for computation in re.split(r"\n(?=%|ENTRY)", program):
        if "fused_computation" in computation.split("(")[0]:
            continue
        for shape, operation in re.findall(r" = f32\[([\d,]+)\]\S* ([\w\-]+)\(", computation):
            found.add((tuple(map(int, shape.split(","))), operation))
    return found


def of_kernels(found):
    kernels = {*KERNELS, *(shape[::-1] for shape in KERNELS)}
    return {(shape, operation) for shape, operation in found if shape in kernels} - {
        (shape, operation) for shape in kernels for operation in ("parameter", "get-tuple-element", "bitcast")
    }


def test_full_training_makes_the_gradient_of_each_kernel():
    shapes = {shape for shape, _ in of_kernels(made("full"))}
    assert all(shape in shapes or shape[::-1] in shapes for shape in KERNELS)


@pytest.mark.parametrize("variant", ["lora", "lora, dropout", "dora"])
def test_adapters_make_nothing_of_a_kernels_shape(variant):
    # A kernel may be turned for a product; it is the kernel still.
    assert {operation for _, operation in of_kernels(made(variant))} <= {"transpose", "copy"}
