"""Ragged documents in two layouts: padded as transformers' processor pads them, and packed as this package does.

Sizes are drawn from the mixes of launch/mixes.py (COCO-like pairs, OBELICS-like pages), with images at 0.3 of
their sides and texts at a fifth of their length, so that two cores can train on them. Pixels and words are random:
what they say does not change what they cost.
"""

import dataclasses
from typing import Any

import numpy as np

from data_pipelines.packing import Pool, Sizes, pack_row
from idefics_jax.batch import Batch, BatchShape, Encoded, empty_batch, place_document
from idefics_jax.config import Idefics2Config
from idefics_jax.inference.answer import bucket
from idefics_jax.processor import first_fit
from launch.mixes import IMAGE_TOKENS, MIXES

IMAGE_SCALE, TEXT_SCALE, LEAST_WORDS = 0.3, 0.2, 12
BOS, FAKE, IMAGE = 1, 32000, 32001
IGNORED = -100  # a label that transformers does not score


@dataclasses.dataclass(frozen=True)
class Document:
    """Token ids int32 [n], and its images, uint8 [height, width, 3] each, in whole patches."""

    tokens: np.ndarray
    images: tuple[np.ndarray, ...]

    def encoded(self, patch: int) -> Encoded:
        grids = tuple((image.shape[0] // patch, image.shape[1] // patch) for image in self.images)
        return Encoded(self.tokens, ~np.isin(self.tokens, (IMAGE, FAKE)), (), grids)


def draw(rng: np.random.Generator, *, pairs: int, pages: int, config: Idefics2Config) -> list[Document]:
    """Draws documents of the two mixes; the text of each is spread after its images."""
    streams = (MIXES["pairs"].documents(rng), MIXES["web"].documents(rng))
    sizes = [next(stream) for stream, count in zip(streams, (pairs, pages), strict=True) for _ in range(count)]
    documents = []
    for tokens, grids in sizes:
        words = max(LEAST_WORDS, round((tokens - IMAGE_TOKENS * len(grids)) * TEXT_SCALE))
        scaled = [tuple(max(1, round(side * IMAGE_SCALE)) for side in grid) for grid in grids]
        documents.append(document(rng, words, scaled, config=config))
    return documents


def document(rng: np.random.Generator, words: int, grids: list[tuple[int, int]], *, config: Idefics2Config) -> Document:
    """Makes a document of so many words, spread after images of the given (rows, columns) of patches."""
    patch, latents = config.vision_config.patch_size, config.perceiver_config.resampler_n_latents
    tokens = [BOS]
    for part in np.array_split(rng.integers(3, FAKE, words), len(grids)):
        tokens += [FAKE, *[IMAGE] * latents, FAKE, *part.tolist()]
    images = tuple(rng.integers(0, 256, (rows * patch, columns * patch, 3), np.uint8) for rows, columns in grids)
    return Document(np.array(tokens, np.int32), images)


def padded(documents: list[Document], *, side: str) -> dict[str, np.ndarray]:
    """Returns transformers' inputs: a document a row, as long as the longest, images as high and wide as the largest.

    With padding on the right, `labels` are there too: all but image tokens, padding and the first token.
    """
    length, count = max(len(it.tokens) for it in documents), max(len(it.images) for it in documents)
    height, width, _ = np.max([image.shape for it in documents for image in it.images], axis=0)
    ids, mask = np.zeros((2, len(documents), length), np.int64)
    pixels = np.zeros((len(documents), count, 3, height, width), np.float32)
    pixel_mask = np.zeros((len(documents), count, height, width), bool)
    for row, it in enumerate(documents):
        begin = length - len(it.tokens) if side == "left" else 0
        ids[row, begin : begin + len(it.tokens)] = it.tokens
        mask[row, begin : begin + len(it.tokens)] = 1
        for i, image in enumerate(it.images):
            h, w, _ = image.shape
            pixels[row, i, :, :h, :w] = (image.transpose(2, 0, 1).astype(np.float32) / 255 - 0.5) / 0.5
            pixel_mask[row, i, :h, :w] = True
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "pixel_attention_mask": pixel_mask}
    if side == "right":
        unscored = (mask == 0) | np.isin(ids, (FAKE, IMAGE)) | (np.arange(length) == 0)
        inputs["labels"] = np.where(unscored, IGNORED, ids)
    return inputs


def packed(documents: list[Document], shape: BatchShape, config: Idefics2Config) -> tuple[Batch, list[Document]]:
    """Packs all documents into the rows of a batch; returns it, and the documents in the order of rows and segments.

    Raises:
      ValueError: they do not all fit.
    """
    pool, patch = Pool(), config.vision_config.patch_size
    for it in documents:
        pool.add(it, Sizes(len(it.tokens), tuple(rows * columns for rows, columns in it.encoded(patch).grids)))
    batch, order = empty_batch(shape), []
    for row in range(shape.rows):
        placements = pack_row(pool, shape, rounds=100, rng=np.random.default_rng(row)) if len(pool) else []
        token = image = 0
        for segment, placement in enumerate(placements, start=1):
            _place(batch, row, placement.item, segment, token, image, placement.vision_slots, config)
            token, image = token + len(placement.item.tokens), image + len(placement.item.images)
            order.append(placement.item)
    if len(pool):
        raise ValueError(f"{len(pool)} of {len(documents)} documents do not fit {shape}; give it more room")
    return batch, order


def prompts(documents: list[Document], config: Idefics2Config) -> Batch:
    """Returns a document a row, padded on the left: the layout of idefics_jax.inference.answer."""
    patch = config.vision_config.patch_size
    encoded = [it.encoded(patch) for it in documents]
    shape = bucket(encoded, rows=len(documents), patch_dim=config.vision_config.patch_dim)
    batch = empty_batch(shape)
    for row, it in enumerate(documents):
        slots = first_fit([rows * columns for rows, columns in encoded[row].grids], shape.patches)
        _place(batch, row, it, 1, shape.tokens - len(it.tokens), 0, slots, config)
    return batch


def per_document(batch: Batch, values: Any) -> list[np.ndarray]:
    """Cuts [B, T, ...] into an array a document, in the order of rows and segments."""
    values, segments = np.asarray(values), np.asarray(batch["segment_ids"])
    return [values[row][own == segment] for row, own in enumerate(segments) for segment in range(1, own.max() + 1)]


def describe(documents: list[Document], shape: BatchShape, config: Idefics2Config) -> str:
    """Says what the documents hold, and how much of either layout they fill."""
    grids = np.array([grid for it in documents for grid in it.encoded(config.vision_config.patch_size).grids])
    tokens, patches = sum(len(it.tokens) for it in documents), grids.prod(axis=1).sum()
    longest = max(len(it.tokens) for it in documents)
    return (
        f"{len(documents)} documents of {tokens} tokens, {len(grids)} images of {patches} patches; useful when padded: "
        f"{tokens / (len(documents) * longest):.2f} of tokens, {patches / (len(grids) * grids.max(0).prod()):.2f} of "
        f"patches; when packed: {tokens / (shape.rows * shape.tokens):.2f} and "
        f"{patches / (shape.rows * shape.vision_rows * shape.patches):.2f}"
    )


def _place(
    batch: Batch, row: int, it: Document, segment: int, token: int, image: int, slots: Any, config: Idefics2Config
) -> None:
    patch = config.vision_config.patch_size
    place_document(
        batch,
        row,
        encoded=it.encoded(patch),
        patches=[_cut(pixels, patch) for pixels in it.images],
        segment=segment,
        token_offset=token,
        image_offset=image,
        vision_slots=slots,
        positions_per_side=config.vision_config.positions_per_side,
    )


def _cut(image: np.ndarray, patch: int) -> np.ndarray:
    """uint8 [h, w, 3] -> [rows * columns, patch * patch * 3]."""
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    return image.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2).reshape(rows * columns, -1)
