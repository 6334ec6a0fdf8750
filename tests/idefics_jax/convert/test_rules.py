import numpy as np
import pytest
import torch
import transformers

from idefics_jax.config import Idefics2Config
from idefics_jax.convert import rules
from tests.idefics_jax.convert.released import RELEASED_CONFIG


@pytest.mark.parametrize(
    ("op", "shape"),
    [(rules.SAME, (7,)), (rules.TRANSPOSE, (3, 5)), (rules.PATCHES, (6, 3, 4, 4))],
    ids=lambda x: getattr(x, "name", None),
)
def test_every_op_is_undone_by_its_inverse(op, shape):
    x = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(op.to_hf(op.to_ours(x)), x)


def test_patch_kernel_does_to_patches_what_the_convolution_does_to_pixels():
    rng = np.random.default_rng(0)
    weight, image = rng.normal(size=(5, 3, 4, 4)), rng.normal(size=(3, 8, 12))
    convolved = torch.nn.functional.conv2d(torch.tensor(image)[None], torch.tensor(weight), stride=4)[0]
    patches = image.transpose(1, 2, 0).reshape(2, 4, 3, 4, 3).swapaxes(1, 2).reshape(6, 48)
    ours = patches @ rules.PATCHES.to_ours(weight)
    np.testing.assert_allclose(ours.reshape(2, 3, 5).transpose(2, 0, 1), convolved.numpy(), atol=1e-12)


def test_no_name_stands_in_two_rows():
    for names in ([rule.hf for rule in rules.RULES], [rule.ours for rule in rules.RULES]):
        assert len(set(names)) == len(names)


def test_table_gives_every_tensor_of_the_released_model_its_shape():
    hf_config = transformers.Idefics2Config(**RELEASED_CONFIG)
    with torch.device("meta"):
        model = transformers.Idefics2ForConditionalGeneration(hf_config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    leaves = rules.leaves(Idefics2Config.from_hf(RELEASED_CONFIG))
    assert {name: leaf.hf_shape for leaf in leaves for name in leaf.names} == theirs
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == 8_402_768_112
