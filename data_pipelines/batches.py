"""Documents into batches: encode, pack, decode, each a step on Grain's iterators.

What waits to be packed is known by its index in the endless sequence of rows, and by its number among the pieces of
one that was cut, so the whole position of the pipeline is a handful of integers: where reading stands, and the pool.
Restoring reads the pool's documents again and goes on to the bit. A state has the same fields of the same types
throughout, as Grain asks: what varies in length is text.
"""

import collections
import concurrent.futures
import dataclasses
import json
from typing import Any

import grain
import numpy as np

from data_pipelines.cache import Cache
from data_pipelines.packing import Pool, Sizes, misfit, pack_row
from data_pipelines.rejection import Ledger, Rejected
from idefics_jax.batch import Batch, BatchShape, Encoded, empty_batch, place_document
from idefics_jax.documents import Document, Image, Text
from idefics_jax.errors import UserError
from idefics_jax.images import RejectedImage
from idefics_jax.processor import Processor

# Documents that a thread reads ahead.
_READ_AHEAD = 16
# About what the Python objects of a small document take.
_OBJECT_BYTES = 2048


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A document that fits a row: what to call it, its ids and its sizes."""

    name: str
    encoded: Encoded
    sizes: Sizes


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Each row's documents with their images' places (packing.Placement), and the Ledger's counts up to them."""

    rows: tuple[tuple[tuple[Candidate, tuple[tuple[int, int], ...]], ...], ...]
    seen: int
    rejected: dict[str, int]
    examples: dict[str, str]


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A batch and where it came from.

    Attributes:
      arrays: numpy arrays, as batch.py says.
      documents: "source/file:row" of each document, row after row.
      seen: documents read since training began, the waiting and the rejected ones included; each piece of one that was
        cut counts.
      rejected: how many of those were rejected, by reason.
      examples: the name of the first document rejected for each reason.
    """

    arrays: Batch
    documents: tuple[str, ...]
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
        encoded = processor.encode(document.parts, add_bos=True, add_eos=True)
    except RejectedImage as error:
        return Rejected(name, error.reason, str(error))
    sizes = Sizes(len(encoded.tokens), tuple(rows * columns for rows, columns in encoded.grids))
    fault = misfit(sizes, shape)
    if fault is None and not encoded.trained[1:-1].any():  # the first id is never a target, the last is </s>
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
            f"it has {characters} characters, more than the {shape.tokens} tokens of a row spell; raise "
            "data.shape.tokens",
        )
    return None


def encoded_size(candidate: Candidate | Rejected) -> int:
    """Returns about how many bytes it takes to keep a document encoded."""
    if isinstance(candidate, Rejected):
        return _OBJECT_BYTES
    return _OBJECT_BYTES + 5 * candidate.sizes.tokens + sum(len(image.data) for image in candidate.encoded.images)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How documents become batches.

    Attributes:
      shape: budgets of a row, and rows in a batch.
      lookahead: documents that wait to be chosen from.
      rounds: see packing.pack_row.
      seed: of the choices.
      max_bad_fraction: share of rejected documents above which iteration stops with a UserError.
      num_threads: threads that read and encode, and as many that decode; 0 for none.
      identity: names everything the sequence of batches depends on; a state saved under another is refused.
    """

    shape: BatchShape
    lookahead: int
    rounds: int
    seed: int
    max_bad_fraction: float
    num_threads: int
    identity: str


class PackIterDataset(grain.IterDataset):
    """Packs an endless sequence of (index, Candidates and Rejected of its row) into PackedRows, a batch at a time."""

    def __init__(self, parent: grain.MapDataset, packing: Packing):
        super().__init__(parent)
        self._packing = packing

    def __iter__(self) -> grain.DatasetIterator:
        return _PackIterator(self._parent, self._packing)


class _PackIterator(grain.DatasetIterator):
    def __init__(self, documents: grain.MapDataset, packing: Packing):
        threads = packing.num_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_READ_AHEAD * threads)
        super().__init__(iter(documents.to_iter_dataset(options)))
        self._documents = documents
        self._packing = packing
        self._ledger = Ledger(packing.max_bad_fraction)
        self._pool = Pool()
        self._rows = 0

    def __next__(self) -> PackedRows:
        rows = []
        for _ in range(self._packing.shape.rows):
            self._refill()
            rng = np.random.default_rng((self._packing.seed, self._rows))
            placements = pack_row(self._pool, self._packing.shape, rounds=self._packing.rounds, rng=rng)
            rows.append(tuple((placement.item[-1], placement.vision_slots) for placement in placements))
            self._rows += 1
        return PackedRows(tuple(rows), self._ledger.seen, dict(self._ledger.rejected), dict(self._ledger.examples))

    def get_state(self) -> dict[str, Any]:
        return {
            "identity": self._packing.identity,
            "parent": self._parent.get_state(),
            "pool": json.dumps([(index, piece) for index, piece, _ in self._pool.items]),
            "rows": self._rows,
            "seen": self._ledger.seen,
            "rejected": json.dumps(self._ledger.rejected),
            "examples": json.dumps(self._ledger.examples),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        if state["identity"] != self._packing.identity:
            raise UserError(
                f"the saved position belongs to other data or other data settings (it has {state['identity']}, this "
                f"run {self._packing.identity}); go on with the same files, config.data and number of processes"
            )
        self._parent.set_state(state["parent"])
        counted, examples = json.loads(state["rejected"]), json.loads(state["examples"])
        self._ledger = Ledger(self._ledger.limit, state["seen"], counted, examples)
        self._rows = state["rows"]
        self._pool = Pool()
        for index, piece in json.loads(state["pool"]):
            _, pieces = self._documents[index]
            candidate = dict(enumerate(pieces)).get(piece)
            if not isinstance(candidate, Candidate):
                why = candidate.message if isinstance(candidate, Rejected) else "its row is cut otherwise now"
                raise UserError(f"piece {piece} of {pieces[0].name} could be read when the position was saved: {why}")
            self._pool.add((index, piece, candidate), candidate.sizes)

    def _refill(self) -> None:
        while len(self._pool) < self._packing.lookahead:
            index, pieces = next(self._parent)
            for piece, candidate in enumerate(pieces):
                self._ledger.seen += 1
                if isinstance(candidate, Rejected):
                    self._ledger.reject(candidate)
                else:
                    self._pool.add((index, piece, candidate), candidate.sizes)


class DecodeIterDataset(grain.IterDataset):
    """Decodes the images of PackedRows into PackedBatch; a document whose pixels are damaged leaves padding behind."""

    def __init__(self, parent: grain.IterDataset, packing: Packing, *, processor: Processor, cache: Cache):
        """`cache` keeps patches between epochs."""
        super().__init__(parent)
        self._packing = packing
        self._processor = processor
        self._cache = cache

    def __iter__(self) -> grain.DatasetIterator:
        return _DecodeIterator(iter(self._parent), self._packing, self._processor, self._cache)


class _DecodeIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, packing: Packing, processor: Processor, cache: Cache):
        super().__init__(parent)
        self._packing = packing
        self._processor = processor
        self._cache = cache
        self._undecodable: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, str] = {}  # of the undecodable
        threads = packing.num_threads
        self._threads = concurrent.futures.ThreadPoolExecutor(threads) if threads else None

    def __next__(self) -> PackedBatch:
        packed = next(self._parent)
        decode = self._threads.map if self._threads else map
        decoded = list(decode(self._decode_row, packed.rows))
        batch = empty_batch(self._packing.shape)
        names = []
        for row, documents in enumerate(decoded):
            names += self._place_row(batch, row, documents, packed)
        rejected = collections.Counter(packed.rejected) + self._undecodable
        return PackedBatch(batch, tuple(names), packed.seen, dict(rejected), {**self._examples, **packed.examples})

    def get_state(self) -> dict[str, Any]:
        undecodable, examples = json.dumps(self._undecodable), json.dumps(self._examples)
        return {"parent": self._parent.get_state(), "undecodable": undecodable, "examples": examples}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._undecodable = collections.Counter(json.loads(state["undecodable"]))
        self._examples = json.loads(state["examples"])

    def _decode_row(self, row: tuple) -> list[tuple[Candidate, tuple, list[np.ndarray] | Rejected]]:
        def patches(candidate: Candidate) -> list[np.ndarray] | Rejected:
            how = tuple((image.split, image.upscale) for image in candidate.encoded.images)
            return self._cache.get((candidate.name, how), lambda: self._decode(candidate), _patch_bytes)

        return [(candidate, slots, patches(candidate)) for candidate, slots in row]

    def _decode(self, candidate: Candidate) -> list[np.ndarray] | Rejected:
        try:
            patches = self._processor.patches(candidate.encoded)
        except RejectedImage as error:
            return Rejected(candidate.name, error.reason, str(error))
        if tuple(map(len, patches)) != candidate.sizes.images:
            return Rejected(candidate.name, "corrupt", "an image is of another size than its header says")
        return patches

    def _place_row(self, batch: Batch, row: int, documents: list, packed: PackedRows) -> list[str]:
        """Writes the documents that could be decoded, one after another; returns their names."""
        names, token_offset, image_offset = [], 0, 0
        for candidate, slots, patches in documents:
            if isinstance(patches, Rejected):
                counted = collections.Counter(packed.rejected) + self._undecodable
                Ledger(self._packing.max_bad_fraction, packed.seen, counted).reject(patches)
                self._undecodable[patches.reason] += 1
                self._examples.setdefault(patches.reason, patches.name)
                continue
            names.append(candidate.name)
            place_document(
                batch,
                row,
                encoded=candidate.encoded,
                patches=patches,
                segment=len(names),
                token_offset=token_offset,
                image_offset=image_offset,
                vision_slots=list(slots),
                positions_per_side=self._processor.image_rules.positions_per_side,
            )
            token_offset += len(candidate.encoded.tokens)
            image_offset += len(patches)
        return names


def _patch_bytes(patches: list[np.ndarray] | Rejected) -> int:
    return _OBJECT_BYTES + (0 if isinstance(patches, Rejected) else sum(patch.nbytes for patch in patches))
