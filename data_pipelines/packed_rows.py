"""Documents into packed rows: encoded, measured and placed, with not a pixel decoded. A step on Grain's iterators.

What waits to be packed is known by its index in the endless sequence of rows, and by its number among the pieces of
one that was cut, so the whole position of a shard is a handful of integers: where reading stands, and the pool.
Restoring reads the pool's documents again, each of which has to be what it was, and goes on to the bit. A state has the
same fields of the same types throughout, as Grain asks: what varies in length is text.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from data_pipelines.mixture import Mixture
from data_pipelines.packing import Pool, Sizes, misfit, pack_row
from data_pipelines.rejection import FILTERED, Ledger, Rejected
from idefics_jax.batch import BatchShape, Encoded
from idefics_jax.documents import Document, Image, Text
from idefics_jax.errors import UserError
from idefics_jax.images import RejectedImage
from idefics_jax.processor import Processor

# Documents that a thread reads ahead.
_READ_AHEAD = 4
# The reason of pieces that waited as the run before ended, while others of their document had been packed.
LEFT_BEHIND = f"{FILTERED}left_by_the_run_before"
# Bytes in the middle of an image that tell it from others of its size.
_MARKED_BYTES = 64
# About what the Python objects of a small document take.
OBJECT_BYTES = 2048


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A document that fits a row: what to call it, its ids and its sizes."""

    name: str
    encoded: Encoded
    sizes: Sizes

    @functools.cached_property
    def mark(self) -> int:
        """A checksum of its ids, and of the sizes and some bytes of its images: whether it is read as it was."""
        mark = zlib.crc32(self.encoded.tokens)
        for image in self.encoded.images:
            middle = len(image.data) // 2
            mark = zlib.crc32(b"%d:%b" % (len(image.data), image.data[middle : middle + _MARKED_BYTES]), mark)
        return mark


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """The rows that a shard gives to a batch, and its counts up to them.

    Attributes:
      rows: each row's documents, with the places of their images (packing.Placement).
      positions: how many rows of each source have been read.
      seen, rejected, examples: the Ledger's.
    """

    rows: tuple[tuple[tuple[Candidate, tuple[tuple[int, int], ...]], ...], ...]
    positions: dict[str, int]
    seen: int
    rejected: dict[str, int]
    examples: dict[str, str]


def encode(document: Document, processor: Processor, shape: BatchShape) -> Candidate | Rejected:
    """Turns a document into ids and sizes, or rejects it if no row could hold it; no pixel is decoded."""
    name = f"{document.source}/{document.id}"
    fault = _hopeless(document, processor, shape)
    if fault is not None:
        return Rejected(name, *fault)
    try:
        encoded = processor.encode(document.parts, add_bos=True, add_eos=document.ends)
    except RejectedImage as error:
        return Rejected(name, error.reason, str(error))
    sizes = Sizes(len(encoded.tokens), tuple(rows * columns for rows, columns in encoded.grids))
    fault = misfit(sizes, shape)
    own = encoded.trained[1:-1] if document.ends else encoded.trained[1:]  # without <s>, no target, and </s>
    if fault is None and not own.any():
        fault = "nothing-trained", "it has no text to learn from; drop the row"
    return Candidate(name, encoded, sizes) if fault is None else Rejected(name, *fault)


def _hopeless(document: Document, processor: Processor, shape: BatchShape) -> tuple[str, str] | None:
    """Returns (reason, sentence) if a document is too large by its parts alone, before megabytes of it are encoded."""
    images = sum(isinstance(part, Image) for part in document.parts)
    if images > shape.images:
        return misfit(Sizes(0, (0,) * images), shape)
    characters = sum(len(part.text) for part in document.parts if isinstance(part, Text))
    if characters > shape.tokens * processor.tokenizer.longest_piece:
        return (
            "too-many-tokens",
            f"it has {characters} characters, more than {shape.tokens} tokens spell; raise document_tokens of the data "
            "or its source",
        )
    return None


def encoded_size(candidate: Candidate | Rejected) -> int:
    """Returns about how many bytes it takes to keep a document encoded."""
    if isinstance(candidate, Rejected):
        return OBJECT_BYTES
    return OBJECT_BYTES + 5 * candidate.sizes.tokens + sum(len(image.data) for image in candidate.encoded.images)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a shard's documents become rows.

    Attributes:
      shape: budgets of a row; its rows are those that the shard gives to a batch.
      lookahead: documents that wait to be chosen from.
      lookahead_bytes: the most that they may take, while there are two of them.
      rounds: see packing.pack_row.
      seed: of the choices.
      max_bad_fraction: share of rejected documents above which iteration stops with a UserError.
      num_threads: threads that read and encode; 0 for none.
    """

    shape: BatchShape
    lookahead: int
    lookahead_bytes: int
    rounds: int
    seed: tuple[int, ...]
    max_bad_fraction: float
    num_threads: int


class PackIterDataset(grain.IterDataset):
    """Packs a shard's endless sequence of (index, Candidates and Rejected of its row) into PackedRows."""

    def __init__(self, parent: grain.MapDataset, packing: Packing, mixture: Mixture, *, left: Sequence[str]):
        """`mixture` says where the row of each index comes from; `left` names the pieces that are LEFT_BEHIND."""
        super().__init__(parent)
        self._packing = packing
        self._mixture = mixture
        self._left = left

    def __iter__(self) -> grain.DatasetIterator:
        return _PackIterator(self._parent, self._packing, self._mixture, self._left)


class _PackIterator(grain.DatasetIterator):
    def __init__(self, documents: grain.MapDataset, packing: Packing, mixture: Mixture, left: Sequence[str]):
        threads = packing.num_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_READ_AHEAD * threads)
        super().__init__(iter(documents.to_iter_dataset(options)))
        self._documents = documents
        self._packing = packing
        self._mixture = mixture
        counted, examples = ({LEFT_BEHIND: len(left)}, {LEFT_BEHIND: left[0]}) if left else ({}, {})
        self._ledger = Ledger(packing.max_bad_fraction, len(left), counted, examples)
        self._pool = Pool()
        self._begun: set[int] = set()  # rows that were cut, of which one piece is packed and another waits
        self._waiting_bytes = 0
        self._read = 0  # rows of the sequence
        self._rows = 0

    def __next__(self) -> PackedRows:
        rows = []
        for _ in range(self._packing.shape.rows):
            self._refill()
            rng = np.random.default_rng((*self._packing.seed, self._rows))
            placements = pack_row(self._pool, self._packing.shape, rounds=self._packing.rounds, rng=rng)
            rows.append(tuple((placement.item[-1], placement.vision_slots) for placement in placements))
            self._begun |= {index for index, *_ in (placement.item for placement in placements)}
            self._begun &= {index for index, *_ in self._pool.items}
            self._waiting_bytes -= sum(encoded_size(candidate) for candidate, _ in rows[-1])
            self._rows += 1
        ledger = self._ledger
        positions = self._mixture.positions(self._read)
        return PackedRows(tuple(rows), positions, ledger.seen, dict(ledger.rejected), dict(ledger.examples))

    def get_state(self) -> dict[str, Any]:
        return {
            "parent": self._parent.get_state(),
            "pool": json.dumps([(index, piece) for index, piece, _ in self._pool.items]),
            "marks": json.dumps([candidate.mark for *_, candidate in self._pool.items]),
            "begun": json.dumps(sorted(self._begun)),
            # For a run that goes on with other settings (position.reached).
            "positions": json.dumps(self._mixture.positions(self._read)),
            "waiting": json.dumps([*self._mixture.set_aside, *map(self._mixture, self._waiting_rows())]),
            "left": json.dumps([candidate.name for index, _, candidate in self._pool.items if index in self._begun]),
            "read": self._read,
            "rows": self._rows,
            "seen": self._ledger.seen,
            "rejected": json.dumps(self._ledger.rejected),
            "examples": json.dumps(self._ledger.examples),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        counted, examples = json.loads(state["rejected"]), json.loads(state["examples"])
        self._ledger = Ledger(self._ledger.limit, state["seen"], counted, examples)
        self._read, self._rows = state["read"], state["rows"]
        self._pool, self._waiting_bytes, self._begun = Pool(), 0, set(json.loads(state["begun"]))
        row, pieces = None, ()
        for (index, piece), mark in zip(json.loads(state["pool"]), json.loads(state["marks"]), strict=True):
            if index != row:  # the pieces of a row wait one after another
                row, (_, pieces) = index, self._documents[index]
            candidate = dict(enumerate(pieces)).get(piece)
            if not isinstance(candidate, Candidate):
                bad = [it.message for it in (candidate, *pieces) if isinstance(it, Rejected)]
                why = bad[0] if bad else "its row is cut otherwise now"
                raise UserError(f"piece {piece} of {pieces[0].name} could be read when the position was saved: {why}")
            if candidate.mark != mark:
                raise UserError(
                    f"{candidate.name} is not what it was when the position was saved, so its file has been written "
                    "anew; give the files as they were, or start in another workdir"
                )
            self._wait(index, piece, candidate)

    def _refill(self) -> None:
        packing = self._packing
        while len(self._pool) < packing.lookahead and (
            len(self._pool) < 2 or self._waiting_bytes < packing.lookahead_bytes
        ):
            index, pieces = next(self._parent)
            self._read = index + 1
            for piece, candidate in enumerate(pieces):
                self._ledger.seen += 1
                if isinstance(candidate, Rejected):
                    self._ledger.reject(candidate)
                else:
                    self._wait(index, piece, candidate)

    def _waiting_rows(self) -> list[int]:
        """Returns the rows of which nothing is packed yet, those that waited in another run included."""
        return sorted({index for index, *_ in self._pool.items} - self._begun) + [
            *range(self._read, self._mixture.leads)
        ]

    def _wait(self, index: int, piece: int, candidate: Candidate) -> None:
        self._pool.add((index, piece, candidate), candidate.sizes)
        self._waiting_bytes += encoded_size(candidate)
