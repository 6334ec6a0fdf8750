"""The connector against Idefics2Connector."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from idefics_jax.models.perceiver import PerceiverConnector, Resampler
from idefics_jax.param_transforms import paths
from idefics_jax.sharding import unbox
from tests.idefics_jax import reference
from tests.idefics_jax.reference import LATENTS, LEAF, PERCEIVER, VISION, assert_close

PATCHES = (7, 2, 11, 1)  # of each image


def images_of(width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(count, width)).astype(np.float32) for count in PATCHES]


def padded(images: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """One image a row: features [M, S, width] and which of them are real."""
    mask = np.arange(max(PATCHES)) < np.array(PATCHES)[:, None]
    features = np.zeros((*mask.shape, images[0].shape[-1]), np.float32)
    features[mask] = np.concatenate(images)
    return torch.from_numpy(features), torch.from_numpy(mask)


def packed(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The first three images in one row, the last in another: features [2, S, width] and image ids [2, S]."""
    features = np.ones((2, sum(PATCHES[:3]) + 2, images[0].shape[-1]), np.float32)
    ids = np.zeros(features.shape[:2], np.int32)
    ids[0, : sum(PATCHES[:3])] = np.repeat([1, 2, 3], PATCHES[:3])
    ids[1, : PATCHES[3]] = 1
    features[ids > 0] = np.concatenate(images)
    return features, ids


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_latents_are_the_reference_s(kv_heads):
    twin = reference.twin(perceiver={"num_key_value_heads": kv_heads})
    images = images_of(PERCEIVER["hidden_size"])
    with torch.no_grad():
        expected = twin.hf.model.connector.perceiver_resampler(*padded(images)).numpy()
    resampler = Resampler(twin.config.perceiver_config, jnp.float32, "none")
    apply = reference.jit(lambda params, *inputs: resampler.apply({"params": params}, *inputs, 3))
    ours = apply(twin.params["connector"]["perceiver_resampler"], *packed(images))
    assert ours.shape == (2, 3, LATENTS, PERCEIVER["hidden_size"])
    assert_close([*ours[0], ours[1, 0]], list(expected), LEAF)
    assert np.all(np.isfinite(ours))  # the second row's missing images too


def test_projection_and_latents_are_the_reference_s():
    twin = reference.twin()
    images = images_of(VISION["hidden_size"])
    with torch.no_grad():
        expected = twin.hf.model.connector(*padded(images)).numpy()
    connector = PerceiverConnector(twin.config, jnp.float32, "none")
    apply = reference.jit(lambda params, *inputs: connector.apply({"params": params}, *inputs, 3))
    features, ids = packed(images)
    ours = apply(twin.params["connector"], features[:, None], ids[:, None])
    assert_close([*ours[0], ours[1, 0]], list(expected), LEAF)


def test_an_image_has_as_many_tokens_as_latents():
    twin = reference.twin()
    assert PerceiverConnector(twin.config, jnp.float32, "none").num_tokens == LATENTS


def test_new_weights_start_as_the_authors_code_has_them():
    """`modeling_vmistral._init_weights`: every width is the decoder's, and only two kinds of weights start smaller."""
    width, depth = 256, 3
    sizes = reference.twin().config
    config = dataclasses.replace(
        sizes,
        perceiver_config=dataclasses.replace(sizes.perceiver_config, hidden_size=width, resampler_depth=depth),
        text_config=dataclasses.replace(sizes.text_config, hidden_size=width),
    )
    connector = PerceiverConnector(config, jnp.float32, "none")
    features, ids = packed(images_of(VISION["hidden_size"]))
    params = reference.jit(connector.init, static_argnums=3)(jax.random.key(0), features[:, None], ids[:, None], 3)
    factors = {"modality_projection/down_proj": 2, "self_attn/o_proj": 2 * depth}
    kernels = {path: x for path, x in paths.flatten(unbox(params)["params"]).items() if path.endswith("/kernel")}
    assert len(kernels) == 10
    for path, kernel in kernels.items():
        factor = next((factor for name, factor in factors.items() if name in path), 1)
        np.testing.assert_allclose(np.std(kernel), (0.4 / (width * factor)) ** 0.5, rtol=0.03, err_msg=path)


def test_new_latents_differ_from_one_another():
    """The reference begins with ones: equal latents get equal gradients and stay equal for ever."""
    config = reference.twin().config.perceiver_config
    features, ids = packed(images_of(config.hidden_size))
    resampler = Resampler(config, jnp.float32, "none")
    params = reference.jit(resampler.init, static_argnums=3)(jax.random.key(0), features, ids, 3)
    latents = unbox(params)["params"]["latents"]
    assert np.abs(np.diff(latents, axis=0)).max(axis=-1).min() > 0.1
