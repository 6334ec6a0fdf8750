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
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from idefics_jax import images
from idefics_jax.documents import Image
from idefics_jax.errors import UserError

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


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A document as the packer sees it: exact sizes, nothing decoded.

    Attributes:
      tokens: int32 [n].
      trained: bool [n], whether the token counts as a target; never true for image tokens and `<s>`.
      images: each image as it is stored, in reading order.
      grids: (rows, columns) of patches of every image after splitting, in the order of their tokens.
    """

    tokens: np.ndarray
    trained: np.ndarray
    images: tuple[Image, ...]
    grids: tuple[tuple[int, int], ...]


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


def empty_batch(shape: BatchShape, patches: np.ndarray | None = None) -> Batch:
    """Returns a writable numpy batch that is all padding; `patches` of it are taken as they are, where given."""
    given = {} if patches is None else {"patches": patches}
    return {
        name: given[name] if name in given else np.zeros(spec.shape, spec.dtype)
        for name, spec in batch_spec(shape).items()
    }


def fake_batch(
    shape: BatchShape, *, vocab_size: int, image_token_id: int, num_latents: int, positions_per_side: int, seed: int
) -> Batch:
    """Returns a random batch of the kind the data gives: documents with their images, then padding, in every row.

    A row has up to three documents, and its whole budget of images where they fit its tokens and its patches.

    Args:
      shape: the batch's static sizes.
      vocab_size: words are drawn below it.
      image_token_id: the id that is no word.
      num_latents: Q, `<image>` tokens an image.
      positions_per_side: rows and columns of the position table.
      seed: equal seeds give equal batches.
    """
    rng, batch = np.random.default_rng(seed), empty_batch(shape)
    images_a_vision_row = min(-(-shape.images // shape.vision_rows), shape.patches)
    share = shape.patches // images_a_vision_row
    images_a_row = min(shape.images, images_a_vision_row * shape.vision_rows)
    documents = max(1, min(3, shape.tokens // (num_latents + 2)))
    room = shape.tokens // documents
    for row in range(shape.rows):
        token = image = 0
        for segment in range(1, documents + 1):
            length = int(rng.integers(max(room * 7 // 8, min(room, num_latents + 2)), room + 1))
            count = min(images_a_row * segment // documents - image, (length - 1) // num_latents)
            tokens = rng.integers(0, vocab_size - 1, length, dtype=np.int32)
            tokens += tokens >= image_token_id
            tokens[1 : 1 + count * num_latents] = image_token_id
            grids = tuple(_fake_grid(rng, share, positions_per_side) for _ in range(count))
            slots = [divmod(i, images_a_vision_row) for i in range(image, image + count)]
            place_document(
                batch,
                row,
                encoded=Encoded(tokens, tokens != image_token_id, (), grids),
                patches=[rng.integers(0, 256, (rows * columns, shape.patch_dim), np.uint8) for rows, columns in grids],
                segment=segment,
                token_offset=token,
                image_offset=image,
                vision_slots=[(vision_row, place * share) for vision_row, place in slots],
                positions_per_side=positions_per_side,
            )
            token, image = token + length, image + count
    return batch


def _fake_grid(rng: np.random.Generator, patches: int, positions_per_side: int) -> tuple[int, int]:
    """Returns (rows, columns) of an image that about fills `patches`."""
    side = min(positions_per_side, math.isqrt(patches))
    rows = int(rng.integers(-(-side // 2), side + 1))
    return rows, min(positions_per_side, patches // rows)


def check_image_tokens(is_image: np.ndarray, images_of_rows: Sequence[int], latents: int) -> None:
    """Raises UserError where a row has other `<image>` tokens than its images take.

    Args:
      is_image: bool [B, T], where they are.
      images_of_rows: how many images each row has.
      latents: tokens that an image takes.
    """
    for row, (found, own) in enumerate(zip(is_image.sum(axis=1), images_of_rows, strict=True)):
        if found != own * latents:
            raise UserError(
                f"row {row} has {found} <image> tokens; its {own} images need {own * latents} ({latents} each)"
            )


def place_document(
    batch: Batch,
    row: int,
    *,
    encoded: "Encoded",
    patches: list[np.ndarray] | None,
    segment: int,
    token_offset: int,
    image_offset: int,
    vision_slots: list[tuple[int, int]],
    positions_per_side: int,
) -> None:
    """Writes one document into a numpy batch, in place.

    Args:
      batch: as from `empty_batch`; the places written to must still be padding.
      row: the row it goes to.
      encoded: the document.
      patches: uint8 [rows * columns, C] of each of the document's images, in the order of `encoded.grids`; None where
        they lie in the batch already (`patch_places`).
      segment: its number within the row, from 1.
      token_offset: where its tokens begin in the row.
      image_offset: how many images the row holds before it.
      vision_slots: for each image the vision row and the patch it begins at.
      positions_per_side: rows and columns of the position table.

    Raises:
      ValueError: a token, an image or a patch would fall outside the batch, or the lists disagree in length.
    """
    count = len(encoded.tokens)
    _check_place(batch, encoded, patches, token_offset, image_offset, vision_slots)
    span = slice(token_offset, token_offset + count)
    batch["tokens"][row, span] = encoded.tokens
    batch["segment_ids"][row, span] = segment
    batch["positions"][row, span] = np.arange(count)
    batch["loss_weights"][row, token_offset : token_offset + max(count - 1, 0)] = encoded.trained[1:]
    for index, (grid, (vision_row, begin)) in enumerate(zip(encoded.grids, vision_slots, strict=True)):
        place = (row, vision_row, slice(begin, begin + grid[0] * grid[1]))
        if patches is not None:
            batch["patches"][place] = patches[index]
        batch["patch_image_ids"][place] = image_offset + index + 1
        batch["patch_positions"][place] = images.position_ids(*grid, positions_per_side)
    batch["image_mask"][row, image_offset : image_offset + len(encoded.grids)] = 1


def patch_places(
    batch: Batch, row: int, grids: Sequence[tuple[int, int]], vision_slots: Sequence[tuple[int, int]]
) -> list[np.ndarray]:
    """Returns where the patches of a document's images belong in a numpy batch: a view of it for each image."""
    return [
        batch["patches"][row, vision_row, begin : begin + rows * columns]
        for (rows, columns), (vision_row, begin) in zip(grids, vision_slots, strict=True)
    ]


def _check_place(
    batch: Batch,
    encoded: "Encoded",
    patches: list[np.ndarray] | None,
    token_offset: int,
    image_offset: int,
    vision_slots: list[tuple[int, int]],
) -> None:
    row_tokens, row_images = batch["tokens"].shape[1], batch["image_mask"].shape[1]
    vision_rows, row_patches = batch["patch_image_ids"].shape[1:]
    if token_offset + len(encoded.tokens) > row_tokens:
        raise ValueError(
            f"a document of {len(encoded.tokens)} tokens at offset {token_offset} does not fit a row of {row_tokens}; "
            "raise batch.tokens"
        )
    count = len(encoded.grids)
    if image_offset + count > row_images:
        raise ValueError(
            f"a document of {count} images after {image_offset} others does not fit a row of {row_images}; "
            "raise batch.images"
        )
    counts = [rows * columns for rows, columns in encoded.grids]
    given = counts if patches is None else [len(pixels) for pixels in patches]
    if not len(counts) == len(given) == len(vision_slots):
        raise ValueError(
            f"a document of {len(counts)} images came with {len(given)} sets of patches and "
            f"{len(vision_slots)} places; give one of each for every image"
        )
    for grid, count, cut, (vision_row, begin) in zip(encoded.grids, counts, given, vision_slots, strict=True):
        if cut != count:
            raise ValueError(f"an image of {grid[0]} x {grid[1]} patches came with {cut}; cut it again")
        if vision_row >= vision_rows or begin + count > row_patches:
            raise ValueError(
                f"an image of {count} patches at patch {begin} of vision row {vision_row} does not fit "
                f"{vision_rows} vision rows of {row_patches}; raise batch.vision_rows or batch.patches"
            )
