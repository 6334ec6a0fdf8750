"""Where the time of a document goes: each step of the pipeline over all photographs, alone and on one core.

read     a record of a shard, taken out of msgpack
encode   ids, and the image's size from its header
pack     the choice of documents for each row
decode   JPEG to pixels, the gate before it included
resize   to the released sizes
cut      into patches
place    into the batch
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pipeline_sides as sides
from data_pipelines.packing import Pool, Sizes, pack_row
from data_pipelines.records import RecordRows
from idefics_jax import decoding, images, resize
from idefics_jax.batch import Encoded, empty_batch, place_document
from idefics_jax.documents import Image, Text

STEPS = ("read", "encode", "pack", "decode", "resize", "cut", "place")
_ROWS = 40  # rows to pack


def steps(folder: Path) -> dict[str, float]:
    """Returns the milliseconds of CPU time that each step takes of a document."""
    rows, processor = sides.records(folder), sides.processor_of(folder, resizer="simd")
    spent: dict[str, float] = {}
    for _ in range(2):  # the first time warms up
        read = _each(spent, "read", lambda place: rows.row(*place), _places(rows))
        parts = [(Image(row["image"]), Text(row["caption"])) for row in read]
        encoded = _each(spent, "encode", lambda it: processor.encode(it, add_bos=True, add_eos=True), parts)
        spent["pack"] = _pack([Sizes(len(it.tokens), (_count(it),)) for it in encoded])
        stored = [row["image"] for row in read]
        wanted = [images.resized_size(*images.image_size(data, sides.RULES), sides.RULES, 1.0) for data in stored]
        pixels = _each(spent, "resize", _resized, _each(spent, "decode", _decoded, stored, wanted), wanted)
        patches = _each(spent, "cut", lambda array: images.cut(array, sides.RULES.patch_size), pixels)
        _place(spent, encoded, patches)
    return spent


def difference(folder: Path) -> float:
    """Returns by how many levels of 255 our pixels differ from the reference's, in the mean of the worst photograph."""
    exact, worst, rows = dataclasses.replace(sides.RULES, resizer="pillow"), 0.0, sides.records(folder)
    for place in _places(rows):
        data = rows.row(*place)["image"]
        (ours,), (theirs,) = (images.image_patches(data, rules) for rules in (sides.RULES, exact))
        worst = max(worst, float(np.abs(ours.astype(int) - theirs).mean()))
    return worst


def _each(spent: dict[str, float], step: str, run: Callable[..., Any], *columns: Sequence) -> list[Any]:
    began = time.process_time()
    made = [run(*values) for values in zip(*columns, strict=True)]
    spent[step] = (time.process_time() - began) / len(made) * 1e3
    return made


def _places(rows: RecordRows) -> list[tuple[int, int]]:
    return [(group, row) for group, count in enumerate(rows.group_rows) for row in range(count)]


def _count(encoded: Encoded) -> int:
    ((rows, columns),) = encoded.grids
    return rows * columns


def _decoded(data: bytes, size: tuple[int, int]) -> np.ndarray:
    image = decoding.Stored(data, max_pixels=sides.RULES.max_pixels)
    return decoding.rgb_array(image, channels=3 if image.size == size else 4)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    whole = (0, 0, pixels.shape[1], pixels.shape[0])
    return pixels if pixels.shape[2] == 3 else resize.simd(pixels, whole, size)


def _pack(sizes: Sequence[Sizes]) -> float:
    """Returns the milliseconds that packing takes of a document; they go round and round."""
    pool, placed, began = Pool(), 0, time.process_time()
    for row in range(_ROWS):
        while len(pool) < sides.LOOKAHEAD:
            pool.add(None, sizes[(placed + len(pool)) % len(sizes)])
        placed += len(pack_row(pool, sides.SHAPE, rounds=sides.ROUNDS, rng=np.random.default_rng(row)))
    return (time.process_time() - began) / placed * 1e3


def _place(spent: dict[str, float], encoded: list[Encoded], patches: list[np.ndarray]) -> None:
    """Places each document in a vision row of its own, in batches as training makes them."""
    shape = sides.SHAPE
    batches = [empty_batch(shape) for _ in range(-(-len(encoded) // (shape.rows * shape.vision_rows)))]

    def place(index: int, document: Encoded, cut: np.ndarray) -> None:
        rest, vision_row = divmod(index, shape.vision_rows)
        batch, row = divmod(rest, shape.rows)
        place_document(
            batches[batch],
            row,
            encoded=document,
            patches=[cut],
            segment=1,
            token_offset=0,
            image_offset=0,
            vision_slots=[(vision_row, 0)],
            positions_per_side=sides.RULES.positions_per_side,
        )

    _each(spent, "place", place, range(len(encoded)), encoded, patches)
