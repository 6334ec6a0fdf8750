"""What Hugging Face's Idefics2Processor returns, as our batch.

Follows what Idefics2Model.get_image_features of transformers 5.23 does to its inputs: an image that is all zeros is
padding, and a patch counts only if every one of its pixels is real.
"""

from typing import Any

import numpy as np

from idefics_jax.batch import Batch, check_image_tokens
from idefics_jax.config import Idefics2Config
from idefics_jax.errors import UserError
from idefics_jax.images import position_ids

Array = Any  # numpy, JAX or torch (CPU) array


def hf_batch(
    input_ids: Array,
    attention_mask: Array | None = None,
    pixel_values: Array | None = None,
    pixel_attention_mask: Array | None = None,
    *,
    config: Idefics2Config,
) -> tuple[Batch, np.ndarray]:
    """Turns Hugging Face inputs into a batch of one document a row; call as `hf_batch(**inputs, config=config)`.

    Real tokens are moved to the start of their row, whichever side the padding was on, and positions count them.
    `loss_weights` are 1 at t where tokens t and t + 1 are real and t + 1 is no `<image>`: Hugging Face's labels with
    padding and `<image>` set to -100, and with padding on the left the first real token, too. Each image has a vision
    row of its own, as in the reference, so no attention is spent between images.

    Args:
      input_ids: int [B, T].
      attention_mask: int [B, T], 0 = padding; None = no padding.
      pixel_values: float [B, I, 3, H, W], normalised; None = text only.
      pixel_attention_mask: int [B, I, H, W], 1 = a real pixel, a rectangle from the top left; None = all real.
      config: the model's.

    Returns:
      The batch (idefics_jax/batch.py; float32 patches; without the image arrays if no row has an image), and the map
      back: int32 [B, T], where each Hugging Face token went in its row, -1 for padding (see `to_hf_positions`).

    Raises:
      UserError: shapes disagree, a mask is no rectangle of whole patches, or a row's `<image>` tokens are not
        its images times the latents of each.
    """
    ids = np.asarray(input_ids)
    real = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if ids.ndim != 2 or real.shape != ids.shape:
        raise UserError(
            f"input_ids is {list(ids.shape)} and attention_mask {list(real.shape)}; both must be [batch, tokens]"
        )
    places = np.where(real, np.cumsum(real, axis=1) - 1, -1).astype(np.int32)
    batch = _text_arrays(ids, real, places, config.image_token_id)
    images = [[] for _ in ids]
    if pixel_values is not None:
        if len(pixel_values) != len(ids):
            raise UserError(f"pixel_values has {len(pixel_values)} rows and input_ids {len(ids)}; both need the same")
        images = _real_images(np.asarray(pixel_values), pixel_attention_mask, config.vision_config.patch_size)
    is_image = batch["tokens"] == config.image_token_id
    check_image_tokens(is_image, list(map(len, images)), config.perceiver_config.resampler_n_latents)
    if any(images):
        batch |= _image_arrays(images, config)
    return batch, places


def to_hf_positions(values: Array, places: np.ndarray) -> np.ndarray:
    """Puts per-token values [B, T, ...] back at Hugging Face's positions, zeros at padding.

    Args:
      values: what the model gave for the batch.
      places: int32 [B, T], the map from `hf_batch`.
    """
    values = np.asarray(values)
    index = places.reshape(*places.shape, *(1,) * (values.ndim - 2))
    taken = np.take_along_axis(values, np.maximum(index, 0), axis=1)
    return np.where(index >= 0, taken, np.zeros((), values.dtype))


def _text_arrays(ids: np.ndarray, real: np.ndarray, places: np.ndarray, image_token_id: int) -> Batch:
    length = ids.shape[1]
    tokens = np.zeros(ids.shape, np.int32)
    rows, columns = np.nonzero(real)
    tokens[rows, places[rows, columns]] = ids[rows, columns]
    count = real.sum(axis=1, keepdims=True)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    inside = positions < count
    target = np.zeros(ids.shape, np.float32)
    target[:, :-1] = inside[:, 1:] & (tokens[:, 1:] != image_token_id)
    return {
        "tokens": tokens,
        "segment_ids": inside.astype(np.int32),
        "positions": np.where(inside, positions, 0).astype(np.int32),
        "loss_weights": target,
    }


def _real_images(pixels: np.ndarray, mask: Array | None, patch: int) -> list[list[tuple[np.ndarray, int, int]]]:
    """Returns each row's real images as (patches [rows * columns, C], rows, columns)."""
    if pixels.ndim != 5 or pixels.shape[2] != 3:
        raise UserError(f"pixel_values is {list(pixels.shape)}; it must be [batch, images, 3, height, width]")
    shape = (*pixels.shape[:2], *pixels.shape[3:])
    mask = np.ones(shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if mask.shape != shape:
        raise UserError(f"pixel_attention_mask is {list(mask.shape)}; pixel_values ask for {list(shape)}")
    images = []
    for row in range(pixels.shape[0]):
        present = [i for i in range(pixels.shape[1]) if pixels[row, i].any()]
        images.append([_cut(pixels[row, i], mask[row, i], patch, f"image {i} of row {row}") for i in present])
    return images


def _cut(pixels: np.ndarray, mask: np.ndarray, patch: int, where: str) -> tuple[np.ndarray, int, int]:
    """Cuts [3, H, W] into its whole patches [rows * columns, C], in reading order."""
    height, width = int(mask[:, 0].sum()), int(mask[0].sum())
    if not mask[:height, :width].all() or mask.sum() != height * width:
        raise UserError(f"pixel_attention_mask of {where} is no rectangle from the top left; pad right and below only")
    rows, columns = height // patch, width // patch
    if not rows or not columns:
        raise UserError(f"{where} is {width}x{height} pixels; it must hold at least one patch of {patch}x{patch}")
    grid = pixels[:, : rows * patch, : columns * patch].reshape(3, rows, patch, columns, patch)
    return grid.transpose(1, 3, 2, 4, 0).reshape(rows * columns, -1), rows, columns


def _image_arrays(images: list[list[tuple[np.ndarray, int, int]]], config: Idefics2Config) -> Batch:
    vision = config.vision_config
    most = max(len(own) for own in images)
    longest = max(len(patches) for own in images for patches, _, _ in own)
    shape = (len(images), most, longest)
    batch = {
        "patches": np.zeros((*shape, vision.patch_dim), np.float32),
        "patch_image_ids": np.zeros(shape, np.int32),
        "patch_positions": np.zeros(shape, np.int32),
        "image_mask": np.zeros(shape[:2], np.int32),
    }
    for row, own in enumerate(images):
        for i, (patches, rows, columns) in enumerate(own):
            place = (row, i, slice(len(patches)))
            batch["patches"][place] = patches
            batch["patch_image_ids"][place] = i + 1
            batch["patch_positions"][place] = position_ids(rows, columns, vision.positions_per_side)
            batch["image_mask"][row, i] = 1
    return batch
