"""Where the time of a document goes: each step of the pipeline over all photographs, on one core.

read     a record of a shard, taken out of msgpack
encode   ids, and the image's size from its header
pack     the choice of documents for each row
decode   JPEG to pixels, the gate before it included
resize   to the released sizes
cut      into patches, in their places in a batch
place    all else of a document into the batch

What lies between the steps (the order of documents, their counts, Grain) is not among them.
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
from idefics_jax.batch import Batch, Encoded, empty_batch, patch_places, place_document
from idefics_jax.documents import Image, Text

STEPS = ("read", "encode", "pack", "decode", "resize", "cut", "place")
_ROWS = 40  # rows to pack


def steps(folder: Path) -> dict[str, float]:
    """Returns the milliseconds of CPU time that each step takes of a document."""
    rows, processor = sides.records(folder), sides.processor_of(folder, resizer="simd")
    places, shape = _places(rows), sides.SHAPE
    batches = [empty_batch(shape) for _ in range(-(-len(places) // (shape.rows * shape.vision_rows)))]
    for _ in range(2):  # the first time warms up, and writes to pages that the system has zeroed
        spent, encoded = dict.fromkeys(STEPS, 0.0), []
        for place in places:
            row = _timed(spent, "read", rows.row, *place)
            parts = (Image(row["image"]), Text(row["caption"]))
            encoded.append(_timed(spent, "encode", processor.encode, parts, add_bos=True, add_eos=True))
        spent["pack"] = _pack([Sizes(len(it.tokens), (_count(it),)) for it in encoded]) * len(encoded)
        for number, document in enumerate(encoded):
            rest, vision_row = divmod(number, shape.vision_rows)
            batch, row = divmod(rest, shape.rows)
            _fill(spent, batches[batch], row, vision_row, document)
    return {step: seconds / len(places) * 1e3 for step, seconds in spent.items()}


def difference(folder: Path) -> float:
    """Returns by how many levels of 255 our pixels differ from the reference's, in the mean of the worst photograph."""
    exact, worst, rows = dataclasses.replace(sides.RULES, resizer="pillow"), 0.0, sides.records(folder)
    for place in _places(rows):
        data = rows.row(*place)["image"]
        (ours,), (theirs,) = (images.image_patches(data, rules) for rules in (sides.RULES, exact))
        worst = max(worst, float(np.abs(ours.astype(int) - theirs).mean()))
    return worst


def _timed(spent: dict[str, float], step: str, run: Callable[..., Any], *values: Any, **named: Any) -> Any:
    began = time.process_time()
    made = run(*values, **named)
    spent[step] += time.process_time() - began
    return made


def _fill(spent: dict[str, float], batch: Batch, row: int, vision_row: int, document: Encoded) -> None:
    """Writes a document into a row of a batch, where its image has a vision row of its own."""
    (image,), slots = document.images, [(vision_row, 0)]
    size = images.resized_size(*images.image_size(image.data, sides.RULES), sides.RULES, 1.0)
    (patches,) = patch_places(batch, row, document.grids, slots)
    pixels = _timed(spent, "decode", _decoded, image.data, size)
    resized = _timed(spent, "resize", _resized, pixels, size)
    _timed(spent, "cut", images.cut, resized, sides.RULES.patch_size, patches)
    _timed(
        spent,
        "place",
        place_document,
        batch,
        row,
        encoded=document,
        patches=None,
        segment=1,
        token_offset=0,
        image_offset=0,
        vision_slots=slots,
        positions_per_side=sides.RULES.positions_per_side,
    )


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
    """Returns the seconds that packing takes of a document; they go round and round."""
    pool, placed, began = Pool(), 0, time.process_time()
    for row in range(_ROWS):
        while len(pool) < sides.LOOKAHEAD:
            pool.add(None, sizes[(placed + len(pool)) % len(sizes)])
        placed += len(pack_row(pool, sides.SHAPE, rounds=sides.ROUNDS, rng=np.random.default_rng(row)))
    return (time.process_time() - began) / placed
