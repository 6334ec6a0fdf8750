"""Every transform tells of shapes what it makes of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idefics_jax.param_transforms import lora, new_rows, positions, quantize, vocabulary
from tests.idefics_jax import tiny

SPEC = (lora.LoraTarget("text_model/layers/self_attn/.*", 2, 4.0, dora=True),)
KEY = jax.random.key(0)


def adapters(params):
    return lora.init(params, SPEC, KEY)


TRANSFORMS = {
    "lora.init": adapters,
    "lora.scale": lambda params: lora.scale(adapters(params), SPEC),
    "lora.merge": lambda params: lora.merge(params, adapters(params), SPEC),
    "lora.column_norms": lambda params: lora.column_norms(params, adapters(params), SPEC),
    "new_rows": lambda params: new_rows.merge(params, new_rows.init(params, 2)),
    "quantize": lambda params: quantize.quantize(params, ("text_model/layers/.*",)),
    "dequantize": lambda params: quantize.dequantize(quantize.quantize(params, ("text_model/.*",)), jnp.float32),
    "cast": lambda params: quantize.cast(params, jnp.bfloat16),
    "grow": lambda params: vocabulary.grow(params, 70, start="mean", rng=KEY),
    "resize": lambda params: positions.resize(params, 10),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_shapes_become_the_shapes_of_what_arrays_become(transform):
    params = tiny.raw_params()
    told = transform(jax.eval_shape(lambda: params))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(told))
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), told, transform(params))
