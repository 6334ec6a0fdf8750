"""The vision encoder against Idefics2VisionTransformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from idefics_jax.images import position_ids
from idefics_jax.models.siglip import Embeddings, Siglip, normalize
from tests.idefics_jax import reference
from tests.idefics_jax.reference import LEAF, PATCH, PER_SIDE, assert_close, document

SIZES = ((13, 22), (40, 8), (4, 39), (17, 17), (40, 40))


@pytest.fixture(scope="module")
def twin():
    return reference.twin()


def padded(images: list[np.ndarray], patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pixels [M, 3, h, w], and which patches [M, rows, columns] are real."""
    height, width, _ = np.max([image.shape for image in images], axis=0)
    pixels = np.zeros((len(images), 3, height, width), np.float32)
    mask = np.zeros((len(images), height // patch, width // patch), bool)
    for i, image in enumerate(images):
        h, w, _ = image.shape
        pixels[i, :, :h, :w] = reference.normalized(image).transpose(2, 0, 1)
        mask[i, : h // patch, : w // patch] = True
    return torch.from_numpy(pixels), torch.from_numpy(mask)


def test_embeddings_are_the_reference_s_at_every_patch_count():
    """Rows 1..70 against columns 70..1, so each axis meets every count of the released model's 70 x 70 table."""
    patch, per_side = 2, 70
    twin = reference.twin(vision={"hidden_size": 6, "image_size": patch * per_side, "patch_size": patch})
    rng = np.random.default_rng(0)
    grids = [(count, per_side + 1 - count) for count in range(1, per_side + 1)]
    images = [rng.integers(0, 256, (patch * rows, patch * columns, 3), dtype=np.uint8) for rows, columns in grids]
    pixels, mask = padded(images, patch)
    with torch.no_grad():
        expected = twin.hf.model.vision_model.embeddings(pixels, mask).numpy()
    expected = [row[real] for row, real in zip(expected, mask.flatten(1).numpy(), strict=True)]

    embeddings = Embeddings(twin.config.vision_config, jnp.float32)
    params = {"params": twin.params["vision_model"]["embeddings"]}
    patches = np.concatenate([reference.cut(image, patch) for image in images])
    positions = np.concatenate([position_ids(*grid, per_side) for grid in grids])
    ours = np.asarray(embeddings.apply(params, patches[None], positions[None]))[0]
    assert_close(np.split(ours, np.cumsum([rows * columns for rows, columns in grids])[:-1]), expected, LEAF)


@pytest.mark.parametrize("vision_rows", [1, 2])
def test_features_are_the_reference_s_however_images_share_rows(twin, vision_rows):
    images = document(np.random.default_rng(0), *SIZES).images
    pixels, mask = padded(images, PATCH)
    with torch.no_grad():
        expected = twin.hf.model.vision_model(pixels, mask).last_hidden_state.numpy()
    expected = [row[real] for row, real in zip(expected, mask.flatten(1).numpy(), strict=True)]

    batch = reference.batch([[document(np.random.default_rng(0), *SIZES)]], vision_rows=vision_rows, spare=3)
    ids = batch["patch_image_ids"]
    siglip = Siglip(twin.config.vision_config, jnp.float32, "none")
    apply = reference.jit(lambda params, *inputs: siglip.apply({"params": params}, *inputs))
    features = np.asarray(apply(twin.params["vision_model"], batch["patches"], ids, batch["patch_positions"]))
    assert_close([features[ids == i + 1] for i in range(len(images))], expected, LEAF)


def test_uint8_patches_are_normalised_as_the_processor_normalises_pixels():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(normalize(jnp.asarray(levels)), reference.normalized(levels), rtol=0, atol=1e-6)


def test_float_patches_are_taken_as_normalised(twin):
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (1, 5, 3 * PATCH**2), dtype=np.uint8)
    positions = rng.integers(0, PER_SIDE**2, (1, 5))
    embeddings = Embeddings(twin.config.vision_config, jnp.float32)
    params = {"params": twin.params["vision_model"]["embeddings"]}
    raw, scaled = (embeddings.apply(params, x, positions) for x in (patches, reference.normalized(patches)))
    np.testing.assert_allclose(raw, scaled, rtol=0, atol=LEAF)


def test_padding_neither_gives_nor_gets(twin):
    batch = reference.batch([[document(np.random.default_rng(0), (8, 8))]], spare=4)
    siglip = Siglip(twin.config.vision_config, jnp.float32, "none")
    ids, positions = batch["patch_image_ids"], batch["patch_positions"]

    def total(patches):
        features = siglip.apply({"params": twin.params["vision_model"]}, patches, ids, positions)
        return jnp.sum(features**2, where=ids[..., None] > 0)

    grads = np.asarray(reference.jit(jax.grad(total))(reference.normalized(batch["patches"])))
    assert np.all(grads[ids == 0] == 0)
    assert np.all(np.abs(grads[ids > 0]).max(axis=-1) > 0)
