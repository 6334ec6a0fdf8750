"""What the rows of a recipe hold: its mixture packed by sizes alone, as training packs it, and counted.

Sizes of documents are those of launch/stage_mixes.py, which knows each kind of source; data is not read.
"""

import dataclasses
from typing import Any

import numpy as np

from data_pipelines.packing import Pool, Sizes, misfit, pack_row
from idefics_jax.batch import BatchShape
from launch import stage_mixes
from launch.flops import Work

ROWS = 256  # stage 1's shares waver by 5 per cent from one 64 rows to the next


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows without their contents: the arrays of a batch (idefics_jax/batch.py) that say what belongs together.

    Attributes:
      segment_ids, positions: int32 [B, T].
      patch_image_ids: int32 [B, V, S].
    """

    segment_ids: np.ndarray
    positions: np.ndarray
    patch_image_ids: np.ndarray

    def work(self, rows: int, window: int | None) -> Work:
        """Returns what `rows` rows like these hold.

        Args:
          rows: of a batch.
          window: the decoder's sliding window, or None.
        """
        patches = np.concatenate([np.bincount(ids.ravel())[1:] for ids in self.patch_image_ids])
        real = self.segment_ids > 0
        seen = self.positions[real] + 1 if window is None else np.minimum(self.positions[real] + 1, window)
        scale = rows / len(self.segment_ids)
        return Work(
            tokens=float(real.sum() * scale),
            patches=float(patches.sum() * scale),
            images=float((patches > 0).sum() * scale),
            text_pairs=float(seen.sum() * scale),
            vision_pairs=float((patches.astype(float) ** 2).sum() * scale),
        )

    @property
    def fill(self) -> tuple[float, float]:
        """The useful shares of tokens and of patches."""
        return float((self.segment_ids > 0).mean()), float((self.patch_image_ids > 0).mean())


def packed_rows(config: Any, rows: int = ROWS) -> Rows:
    """Packs rows of a recipe's mixture, after the pool has been turned over once.

    Args:
      config: what a file in configs/ returns.
      rows: how many.

    Raises:
      UserError: a kind of source whose sizes are not known.
    """
    stream, shape = stage_mixes.documents(config), BatchShape(**{**config.data.shape, "rows": rows})
    row_shape, pool, turn, placed = dataclasses.replace(shape, rows=1), Pool(), 0, 0
    found = Rows(
        *(np.zeros((rows, shape.tokens), np.int32) for _ in range(2)),
        np.zeros((rows, shape.vision_rows, shape.patches), np.int32),
    )
    kept = 0
    while kept < rows:
        while len(pool) < config.data.lookahead:
            tokens, grids = next(stream)
            sizes = Sizes(tokens, tuple(down * across for down, across in grids))
            if misfit(sizes, row_shape) is None:
                pool.add(sizes, sizes)
        turn += 1
        placements = pack_row(pool, row_shape, rounds=config.data.rounds, rng=np.random.default_rng((0, turn)))
        placed += len(placements)
        if placed >= config.data.lookahead:
            _place(found, kept, placements)
            kept += 1
    return found


def _place(rows: Rows, row: int, placements: Any) -> None:
    """Writes the documents of a row."""
    token = image = 0
    for segment, placement in enumerate(placements, start=1):
        span = slice(token, token + placement.item.tokens)
        rows.segment_ids[row, span] = segment
        rows.positions[row, span] = np.arange(placement.item.tokens)
        for patches, (vision_row, begin) in zip(placement.item.images, placement.vision_slots, strict=True):
            image += 1
            rows.patch_image_ids[row, vision_row, begin : begin + patches] = image
        token = span.stop


def full_rows(shape: BatchShape) -> Rows:
    """Returns a row without padding: one document, and an image in each vision row."""
    images = np.repeat(np.arange(1, shape.vision_rows + 1, dtype=np.int32), shape.patches)
    return Rows(
        segment_ids=np.ones((1, shape.tokens), np.int32),
        positions=np.arange(shape.tokens, dtype=np.int32)[None],
        patch_image_ids=images.reshape(1, shape.vision_rows, shape.patches),
    )
