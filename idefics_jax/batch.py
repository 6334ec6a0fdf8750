"""The batch: the one thing that passes between the data and the model.

A plain dict of fixed-shape arrays. Dims: B rows, T tokens a row, V vision rows a row, S patches a vision row,
I images a row.

    tokens           int32   [B, T]
    segment_ids      int32   [B, T]         document within the row, 1..; 0 = padding
    positions        int32   [B, T]         restart at 0 with each document
    loss_weights     float32 [B, T]         weight at t of predicting tokens[t + 1]; 0 at a document's last token
    patches          uint8   [B, V, S, C]   C = patch_size * patch_size * 3, in (row, column, channel) order;
                                            an image never crosses a vision row
    patch_image_ids  int32   [B, V, S]      image within the row, 1..I, in the order of its tokens; 0 = padding
    patch_positions  int32   [B, V, S]      index into the position table
    image_mask       int32   [B, I]         1 where the row holds such an image; its shape is the image budget

The k-th `<image>` token of a row takes latent k % Q of image k // Q (counted from 0), where Q is the number of
latents. Patches are raw uint8 and are normalised on the device; float32 patches are taken as already normalised.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static sizes of a batch.

    Attributes:
      rows: B, rows in a batch.
      tokens: T, tokens a row.
      vision_rows: V, vision rows a row.
      patches: S, patches a vision row.
      images: I, images a row.
      patch_dim: C, numbers in a patch (patch_size**2 * 3).
    """

    rows: int
    tokens: int
    vision_rows: int
    patches: int
    images: int
    patch_dim: int = 588

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"batch.{field.name} is {value!r}; it must be a whole number of at least 1")


def batch_spec(shape: BatchShape) -> Batch:
    """Returns the batch as ShapeDtypeStructs: what a step is traced and compiled against."""
    text = (shape.rows, shape.tokens)
    vision = (shape.rows, shape.vision_rows, shape.patches)
    return {
        "tokens": jax.ShapeDtypeStruct(text, np.int32),
        "segment_ids": jax.ShapeDtypeStruct(text, np.int32),
        "positions": jax.ShapeDtypeStruct(text, np.int32),
        "loss_weights": jax.ShapeDtypeStruct(text, np.float32),
        "patches": jax.ShapeDtypeStruct((*vision, shape.patch_dim), np.uint8),
        "patch_image_ids": jax.ShapeDtypeStruct(vision, np.int32),
        "patch_positions": jax.ShapeDtypeStruct(vision, np.int32),
        "image_mask": jax.ShapeDtypeStruct((shape.rows, shape.images), np.int32),
    }


def empty_batch(shape: BatchShape) -> Batch:
    """Returns a writable numpy batch that is all padding."""
    return {name: np.zeros(spec.shape, spec.dtype) for name, spec in batch_spec(shape).items()}
