"""Packed rows into batches: the rows of a process's virtual shards side by side, their images decoded.

Each shard is an endless sequence of its own, with a state of its own: whichever process holds it, it gives the same
rows, so the batch of all processes together does not depend on their number.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from data_pipelines import position
from data_pipelines.cache import Cache
from data_pipelines.lent_memory import LentMemory
from data_pipelines.packed_rows import OBJECT_BYTES, Candidate, PackedRows, PackIterDataset
from data_pipelines.rejection import Ledger, Rejected
from idefics_jax.batch import Batch, BatchShape, batch_spec, empty_batch, patch_places, place_document
from idefics_jax.errors import UserError
from idefics_jax.images import RejectedImage
from idefics_jax.processor import Processor
from idefics_jax.settings import differences


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A process's rows of a batch, and where they came from.

    Attributes:
      arrays: numpy arrays, as batch.py says.
      documents: "source/file:row" of each document, row after row.
      epochs: how often each source has been read through, over the process's shards.
      seen: documents read since training began, the waiting and the rejected ones included; each piece of one that was
        cut counts.
      rejected: how many of those were rejected, by reason.
      examples: the name of the first document rejected for each reason.
    """

    arrays: Batch
    documents: tuple[str, ...]
    epochs: dict[str, float]
    seen: int
    rejected: dict[str, int]
    examples: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How packed rows become batches.

    Attributes:
      shards: the numbers of the process's virtual shards.
      shape: of a batch of all of them.
      epoch_rows: rows of each source in an epoch of these shards together.
      max_bad_fraction: share of rejected documents of a shard above which iteration stops with a UserError.
      num_threads: threads that decode; 0 for none.
      about: everything the sequence of batches depends on, as JSON; a state saved with another is refused. Its
        `workers` are what it does not depend on; other ones are named.
    """

    shards: tuple[int, ...]
    shape: BatchShape
    epoch_rows: dict[str, int]
    max_bad_fraction: float
    num_threads: int
    about: str


class DecodeIterDataset(grain.IterDataset):
    """Decodes the images of PackedRows into PackedBatch; a document whose pixels are damaged leaves padding behind."""

    def __init__(self, parents: Sequence[PackIterDataset], decoding: Decoding, *, processor: Processor, cache: Cache):
        """Takes a parent for each shard; `cache` keeps patches between epochs."""
        super().__init__(parents)
        self._decoding = decoding
        self._processor = processor
        self._cache = cache

    def __iter__(self) -> grain.DatasetIterator:
        return _DecodeIterator([iter(it) for it in self._parents], self._decoding, self._processor, self._cache)


class _DecodeIterator(grain.DatasetIterator):
    def __init__(
        self, parents: Sequence[grain.DatasetIterator], decoding: Decoding, processor: Processor, cache: Cache
    ):
        super().__init__(parents)
        self._decoding = decoding
        self._processor = processor
        self._cache = cache
        # Of each shard: documents found damaged when their pixels were wanted, and the first for each reason.
        self._undecodable: list[collections.Counter[str]] = [collections.Counter() for _ in parents]
        self._examples: list[dict[str, str]] = [{} for _ in parents]
        threads = decoding.num_threads
        self._memory = LentMemory(batch_spec(decoding.shape)["patches"].shape)
        self._threads = concurrent.futures.ThreadPoolExecutor(threads) if threads else None

    def __next__(self) -> PackedBatch:
        packed = [next(parent) for parent in self._parents]
        batch = empty_batch(self._decoding.shape, self._memory.lend())
        rows = [row for shard in packed for row in shard.rows]
        decode = self._threads.map if self._threads else map
        decoded = list(decode(functools.partial(self._decode_row, batch), range(len(rows)), rows))
        of_row = [place for place, shard in enumerate(packed) for _ in shard.rows]
        names = []
        for row, (documents, place) in enumerate(zip(decoded, of_row, strict=True)):
            names += self._place_row(batch, row, documents, place, packed[place])
        return PackedBatch(batch, tuple(names), *self._counts(packed))

    def get_state(self) -> dict[str, Any]:
        """Returns {"about": ..., "shards": {number: the shard's state}}."""
        shards = {
            str(shard): {
                "packed": parent.get_state(),
                "undecodable": json.dumps(self._undecodable[place]),
                "examples": json.dumps(self._examples[place]),
            }
            for place, (shard, parent) in enumerate(zip(self._decoding.shards, self._parents, strict=True))
        }
        return {"about": self._decoding.about, "shards": shards}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes the shards that are this process's out of a state, which may hold others.

        Raises:
          UserError: the state belongs to other data, other settings or another number of shards, or another version of
            this code wrote it.
          FileNotFoundError: it lacks a shard that it should have.
        """
        before, about = json.loads(state["about"]), json.loads(self._decoding.about)
        workers = differences(before.pop("workers", {}), about.pop("workers"))
        changed = differences(before, about)
        if changed:
            raise UserError(
                f"the saved position belongs to other data or other data settings ({'; '.join(changed)}); give them as "
                "they were, or start in another workdir"
            )
        if workers:
            logging.warning("the data goes on with other workers (%s): its batches are the same", "; ".join(workers))
        for place, (shard, parent) in enumerate(zip(self._decoding.shards, self._parents, strict=True)):
            own = state["shards"].get(str(shard))
            if own is None:
                raise FileNotFoundError(f"the saved position lacks shard {shard}; put its file back from a copy")
            position.check_fields(
                own,
                position.field_names(self.get_state()["shards"][str(shard)]),
                where=f"shard {shard} of the saved position",
                mend="let that version go on, or start in another workdir",
            )
            parent.set_state(own["packed"])
            self._undecodable[place] = collections.Counter(json.loads(own["undecodable"]))
            self._examples[place] = json.loads(own["examples"])

    def _counts(self, packed: Sequence[PackedRows]) -> tuple[dict[str, float], int, dict[str, int], dict[str, str]]:
        """Returns epochs, seen, rejected and examples over all shards."""
        positions, rejected, examples = collections.Counter(), collections.Counter(), {}
        for shard, undecodable, own in zip(packed, self._undecodable, self._examples, strict=True):
            positions.update(shard.positions)
            rejected.update(shard.rejected)
            rejected.update(undecodable)
            examples = {**own, **shard.examples, **examples}
        epochs = {name: positions[name] / rows for name, rows in self._decoding.epoch_rows.items()}
        return epochs, sum(shard.seen for shard in packed), dict(rejected), examples

    def _decode_row(self, batch: Batch, row: int, documents: tuple) -> list[tuple[Candidate, tuple, Rejected | None]]:
        """Writes the patches of a row's documents into the batch; returns what is wrong with each."""
        ends = [0] * self._decoding.shape.vision_rows

        def fault(candidate: Candidate, slots: tuple) -> Rejected | None:
            places = patch_places(batch, row, candidate.encoded.grids, slots)
            found = self._decode(candidate, places)
            if found is not None:
                for place in places:
                    place[:] = 0
            for (vision_row, begin), place in zip(slots, places, strict=True):
                ends[vision_row] = max(ends[vision_row], begin + len(place))
            return found

        faults = [(candidate, slots, fault(candidate, slots)) for candidate, slots in documents]
        for vision_row, end in enumerate(ends):
            batch["patches"][row, vision_row, end:] = 0
        return faults

    def _decode(self, candidate: Candidate, places: list[np.ndarray]) -> Rejected | None:
        """Writes a document's patches to their places, or says what is wrong."""
        if not self._cache.keeps:
            patches = self._patches(candidate, places)
            return patches if isinstance(patches, Rejected) else None
        how = tuple((image.split, image.upscale) for image in candidate.encoded.images)
        patches = self._cache.get((candidate.name, how), lambda: self._patches(candidate, None), _patch_bytes)
        if isinstance(patches, Rejected):
            return patches
        for place, cut in zip(places, patches, strict=True):
            place[:] = cut
        return None

    def _patches(self, candidate: Candidate, places: list[np.ndarray] | None) -> list[np.ndarray] | Rejected:
        try:
            return self._processor.patches(candidate.encoded, out=places)
        except RejectedImage as error:
            return Rejected(candidate.name, error.reason, str(error))

    def _place_row(self, batch: Batch, row: int, documents: list, place: int, packed: PackedRows) -> list[str]:
        """Writes all else of the documents that could be decoded, one after another; returns their names."""
        names, token_offset, image_offset = [], 0, 0
        for candidate, slots, fault in documents:
            if fault is not None:
                self._reject(fault, place, packed)
                continue
            names.append(candidate.name)
            place_document(
                batch,
                row,
                encoded=candidate.encoded,
                patches=None,
                segment=len(names),
                token_offset=token_offset,
                image_offset=image_offset,
                vision_slots=list(slots),
                positions_per_side=self._processor.image_rules.positions_per_side,
            )
            token_offset += len(candidate.encoded.tokens)
            image_offset += len(slots)
        return names

    def _reject(self, document: Rejected, place: int, packed: PackedRows) -> None:
        counted = collections.Counter(packed.rejected) + self._undecodable[place]
        Ledger(self._decoding.max_bad_fraction, packed.seen, counted).reject(document)
        self._undecodable[place][document.reason] += 1
        self._examples[place].setdefault(document.reason, document.name)


def _patch_bytes(patches: list[np.ndarray] | Rejected) -> int:
    return OBJECT_BYTES + (0 if isinstance(patches, Rejected) else sum(patch.nbytes for patch in patches))
