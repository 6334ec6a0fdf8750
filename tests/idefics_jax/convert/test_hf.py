import dataclasses

import ml_dtypes
import numpy as np
import pytest

from idefics_jax.convert.hf import from_hf, to_hf
from idefics_jax.convert.rules import EMBEDDING, HEAD, leaves
from idefics_jax.errors import UserError
from idefics_jax.param_transforms.paths import flatten, unflatten
from idefics_jax.param_tree import param_shapes
from tests.idefics_jax import tiny

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def random_bits(shape, dtype, rng):
    """Every bit pattern, NaNs and their payloads included."""
    dtype = np.dtype(dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def hf_tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: random_bits(leaf.hf_shape, dtype, rng) for leaf in leaves(tiny.CONFIG) for name in leaf.names}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_bit_for_bit(dtype):
    tensors = hf_tensors(dtype)
    back = to_hf(from_hf(tensors, tiny.CONFIG), tiny.CONFIG)
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_come_back_bit_for_bit(dtype):
    rng = np.random.default_rng(1)
    params = {path: random_bits(x.shape, dtype, rng) for path, x in flatten(param_shapes(tiny.CONFIG)).items()}
    back = flatten(from_hf(to_hf(unflatten(params), tiny.CONFIG), tiny.CONFIG))
    assert back.keys() == params.keys()
    assert all(same_bits(back[path], params[path]) for path in params)


def test_tree_is_the_one_that_init_gives():
    found = flatten(from_hf(hf_tensors(), tiny.CONFIG))
    wanted = flatten(tiny.raw_params())
    assert {path: leaf.shape for path, leaf in found.items()} == {path: leaf.shape for path, leaf in wanted.items()}


def test_missing_and_unexpected_tensors_are_all_listed_in_order():
    tensors = hf_tensors()
    for name in ("model.text_model.norm.weight", "lm_head.weight"):
        del tensors[name]
    tensors |= {"zebra": np.zeros(1), "model.extra": np.zeros(1)}
    with pytest.raises(UserError) as error:
        from_hf(tensors, tiny.CONFIG)
    assert "missing (2): lm_head.weight, model.text_model.norm.weight;" in str(error.value)
    assert "unexpected (2): model.extra, zebra" in str(error.value)


def test_layer_beyond_the_config_is_unexpected():
    tensors = hf_tensors()
    tensors["model.text_model.layers.2.input_layernorm.weight"] = np.zeros(16, np.float32)
    with pytest.raises(UserError, match=r"unexpected \(1\): model.text_model.layers.2.input_layernorm.weight"):
        from_hf(tensors, tiny.CONFIG)


def test_misshaped_tensors_are_named_with_both_shapes():
    tensors = hf_tensors()
    name = "model.text_model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].T
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight is \[16, 24\] and should be \[24, 16\]"):
        from_hf(tensors, tiny.CONFIG)


def test_nothing_is_read_before_the_names_and_shapes_are_right():
    class Unread:
        def __init__(self, shape):
            self.shape = shape

        def __array__(self, *_, **__):
            raise AssertionError("read")

    tensors = {name: Unread(array.shape) for name, array in hf_tensors().items()}
    tensors["lm_head.weight"] = Unread((1, 1))
    with pytest.raises(UserError, match="lm_head.weight"):
        from_hf(tensors, tiny.CONFIG)


def test_layers_of_two_dtypes_are_refused():
    tensors = hf_tensors()
    name = "model.vision_model.encoder.layers.1.mlp.fc1.bias"
    tensors[name] = np.zeros(24, np.float16)
    with pytest.raises(UserError, match=r"layers.1.mlp.fc1.bias is float16 .*layers.0.mlp.fc1.bias float32"):
        from_hf(tensors, tiny.CONFIG)


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshaped"])
def test_parameters_of_another_model_are_not_written(change):
    params = from_hf(hf_tensors(), tiny.CONFIG)
    if change == "missing":
        del params["text_model"]["norm"]
    elif change == "unexpected":
        params["text_model"]["lora"] = np.zeros(2)
    else:
        params["text_model"]["norm"]["scale"] = np.zeros(3)
    with pytest.raises(UserError, match=change.replace("misshaped", "mis-shaped")):
        to_hf(params, tiny.CONFIG)


def tied():
    tensors = hf_tensors()
    del tensors[HEAD]
    return dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True), tensors


def test_tied_model_has_no_head_of_its_own():
    config, tensors = tied()
    params = from_hf(tensors, config)
    assert "lm_head" not in params["text_model"]
    assert to_hf(params, config).keys() == tensors.keys()


def test_tied_head_may_stand_in_the_file_twice_if_it_is_the_same():
    config, tensors = tied()
    tensors[HEAD] = tensors[EMBEDDING].copy()
    assert "lm_head" not in from_hf(tensors, config)["text_model"]
    tensors[HEAD] = np.zeros_like(tensors[EMBEDDING])
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        from_hf(tensors, config)


def test_untied_model_needs_its_head():
    _, tensors = tied()
    with pytest.raises(UserError, match=r"missing \(1\): lm_head.weight"):
        from_hf(tensors, tiny.CONFIG)
