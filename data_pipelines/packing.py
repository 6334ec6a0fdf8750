"""Packing: which documents share a row, within joint budgets of tokens, images and patches.

A row holds T tokens, I images and V vision rows of S patches. A document is placed whole or not at all, so an image
is never cut from its tokens, and each image lies in one vision row. Documents wait in a pool; a row is filled from it
in three moves:

  1. It starts with the oldest document, so that none waits for ever.
  2. It takes the others in order of age while they fit.
  3. It is improved by ruin and recreate (Schrimpf et al., 2000): one or two documents are taken out, others put in
     that fill more, and the change is kept if the row is fuller in tokens and patches together.

Only sizes are looked at: images are decoded after packing.
"""

import copy
import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from idefics_jax.batch import Batch, BatchShape

# A row this full (summed over tokens and patches, as a share left empty) is not improved further.
_FULL_ENOUGH = 0.005
# How many of the best-filling documents are tried for room in the vision rows before giving up.
_TRIES = 4
_LARGEST_RUIN = 2
_NONE = np.zeros(0, np.intp)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a document takes: its tokens, and the patches of each of its images in token order."""

    tokens: int
    images: tuple[int, ...]


class Pool:
    """Documents that wait for a row, oldest first."""

    def __init__(self):
        self.items: list[Any] = []
        self.sizes: list[Sizes] = []
        # One column a document: tokens, patches, patches of the largest image, images.
        self._demand = np.zeros((4, 0), np.int64)
        self._arrived: list[tuple[int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: Any, sizes: Sizes) -> None:
        """Adds a document; `item` is whatever stands for it."""
        self.items.append(item)
        self.sizes.append(sizes)
        self._arrived.append((sizes.tokens, sum(sizes.images), max(sizes.images, default=0), len(sizes.images)))

    def demand(self) -> np.ndarray:
        """Returns int64 [4, n]: tokens, patches, largest image and number of images of each document."""
        if self._arrived:
            self._demand = np.concatenate([self._demand, np.array(self._arrived, np.int64).T], axis=1)
            self._arrived = []
        return self._demand

    def remove(self, places: Sequence[int]) -> None:
        """Removes the documents at some places; the others keep their order."""
        stays = np.ones(len(self.items), bool)
        stays[list(places)] = False
        self._demand = self.demand()[:, stays]
        self.items = [item for item, stay in zip(self.items, stays, strict=True) if stay]
        self.sizes = [sizes for sizes, stay in zip(self.sizes, stays, strict=True) if stay]


@dataclasses.dataclass(frozen=True)
class Placement:
    """A document's place in a row: `vision_slots` holds (vision row, first patch) of each of its images."""

    item: Any
    vision_slots: tuple[tuple[int, int], ...]


def misfit(sizes: Sizes, shape: BatchShape) -> tuple[str, str] | None:
    """Returns (reason, sentence) if a document does not fit even an empty row, else None."""
    largest = max(sizes.images, default=0)
    if sizes.tokens > shape.tokens:
        return (
            "too-many-tokens",
            f"it has {sizes.tokens} tokens, more than {shape.tokens}; raise document_tokens of the data or its source",
        )
    if len(sizes.images) > shape.images:
        return "too-many-images", f"it has {len(sizes.images)} images and a row {shape.images}; raise data.shape.images"
    if largest > shape.patches:
        return (
            "image-too-large",
            f"an image has {largest} patches, a vision row {shape.patches}; raise data.shape.patches",
        )
    if _fit_images(sizes.images, [shape.patches] * shape.vision_rows) is None:
        return "too-many-patches", f"its {sum(sizes.images)} patches do not fit a row; raise data.shape.vision_rows"
    return None


def pack_row(pool: Pool, shape: BatchShape, *, rounds: int, rng: np.random.Generator) -> list[Placement]:
    """Takes the documents of one row out of a pool.

    Args:
      pool: at least one document, each of which fits an empty row.
      shape: the budgets.
      rounds: ruin-and-recreate rounds; 0 leaves the row as age fills it.
      rng: decides what is taken out.

    Returns:
      The row's documents, oldest first.
    """
    row = _Row(pool, shape)
    row.put(0)
    row.put_by_age()
    for _ in range(rounds):
        if row.emptiness() < _FULL_ENOUGH or len(row.vision_rows) < 2:
            break
        changed = row.ruined_and_recreated(rng)
        if changed.emptiness() < row.emptiness():
            row = changed
    placements = row.placements()
    pool.remove(list(row.vision_rows))
    return placements


def fill(batch: Batch) -> dict[str, float]:
    """Returns the useful share of a batch's tokens, patches and image slots."""
    return {
        "tokens": float(np.mean(np.asarray(batch["segment_ids"]) > 0)),
        "patches": float(np.mean(np.asarray(batch["patch_image_ids"]) > 0)),
        "images": float(np.mean(batch["image_mask"])),
    }


class _Row:
    """A row being filled: which documents of the pool are in it, and the room that is left."""

    def __init__(self, pool: Pool, shape: BatchShape):
        self.pool = pool
        self.shape = shape
        self.demand = pool.demand()
        self.least = self.demand.min(axis=1).tolist()  # of each, what every document takes
        # The share of a row's tokens plus that of its patches which each document fills.
        self.filling = self.demand[0] / shape.tokens + self.demand[1] / (shape.vision_rows * shape.patches)
        self.tokens = shape.tokens
        self.images = shape.images
        self.patches = [shape.patches] * shape.vision_rows
        # Place in the pool -> the vision row of each image.
        self.vision_rows: dict[int, tuple[int, ...]] = {}
        self.free = np.ones(len(pool), bool)  # neither in the row, nor kept out of it

    def duplicate(self) -> "_Row":
        """Returns a row that can be changed without changing this one."""
        other = copy.copy(self)
        other.patches, other.vision_rows, other.free = list(self.patches), dict(self.vision_rows), self.free.copy()
        return other

    def emptiness(self) -> float:
        """Returns the empty share of the tokens plus that of the patches."""
        return self.tokens / self.shape.tokens + sum(self.patches) / (self.shape.vision_rows * self.shape.patches)

    def put(self, place: int) -> bool:
        """Puts a document of the pool into the row, unless its images do not fit."""
        sizes = self.pool.sizes[place]
        fitted = _fit_images(sizes.images, self.patches)
        if fitted is None:
            return False
        self.vision_rows[place], self.patches = fitted
        self.tokens -= sizes.tokens
        self.images -= len(sizes.images)
        self.free[place] = False
        return True

    def take_out(self, place: int) -> None:
        """Takes a document out, and keeps it out."""
        sizes = self.pool.sizes[place]
        for vision_row, patches in zip(self.vision_rows.pop(place), sizes.images, strict=True):
            self.patches[vision_row] += patches
        self.tokens += sizes.tokens
        self.images += len(sizes.images)

    def room(self) -> tuple[int, int, int, int]:
        """Returns what is left of what a document demands (Pool.demand)."""
        return self.tokens, sum(self.patches), max(self.patches), self.images

    def fitting(self) -> np.ndarray:
        """Returns the places of documents that may fit (their images may still not find room)."""
        room = self.room()
        if any(map(operator.lt, room, self.least)):
            return _NONE
        tokens, patches, largest, images = map(operator.le, self.demand, room)
        return (tokens & patches & largest & images & self.free).nonzero()[0]

    def put_by_age(self) -> None:
        """Puts in each document that fits, the oldest first, and keeps out those whose images alone find no room."""
        places = self.fitting()
        for place, demand in zip(places.tolist(), self.demand.T[places].tolist(), strict=True):
            # What no longer fits will not again: room only shrinks.
            if all(map(operator.le, demand, self.room())) and not self.put(place):
                self.free[place] = False

    def put_fullest(self) -> bool:
        """Puts in the document that fills most; returns whether there was one."""
        places = self.fitting()
        fullest = (-self.filling[places]).argsort(kind="stable")[:_TRIES]
        return any(self.put(int(place)) for place in places[fullest])

    def ruined_and_recreated(self, rng: np.random.Generator) -> "_Row":
        """Returns the row with one or two documents (never the oldest) exchanged for others."""
        row = self.duplicate()
        inside = list(self.vision_rows)[1:]
        ruin = int(rng.integers(1, min(_LARGEST_RUIN, len(inside)) + 1))
        for i in rng.permutation(len(inside))[:ruin]:
            row.take_out(inside[i])
        if ruin > 1:
            places = row.fitting()
            if len(places):
                row.put(int(places[rng.integers(len(places))]))
        while row.put_fullest():
            pass
        row.free[:] = True
        row.free[list(row.vision_rows)] = False
        return row

    def placements(self) -> list[Placement]:
        """Returns the documents, oldest first, with their images laid side by side in the vision rows."""
        used = [0] * self.shape.vision_rows
        placements = []
        for place in sorted(self.vision_rows):
            slots = []
            for vision_row, patches in zip(self.vision_rows[place], self.pool.sizes[place].images, strict=True):
                slots.append((vision_row, used[vision_row]))
                used[vision_row] += patches
            placements.append(Placement(self.pool.items[place], tuple(slots)))
        return placements


def _fit_images(images: Sequence[int], room: list[int]) -> tuple[tuple[int, ...], list[int]] | None:
    """Finds a vision row for each image: the largest first, each where it leaves least.

    Args:
      images: patches of each image.
      room: patches free in each vision row.

    Returns:
      (the vision row of each image, the room left after), or None if they do not fit so.
    """
    room = list(room)
    rows = [0] * len(images)
    for i in sorted(range(len(images)), key=images.__getitem__, reverse=True):
        fits = [(free, row) for row, free in enumerate(room) if free >= images[i]]
        if not fits:
            return None
        _, rows[i] = min(fits)
        room[rows[i]] -= images[i]
    return tuple(rows), room
