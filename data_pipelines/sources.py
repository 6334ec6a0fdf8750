"""Sources: rows of a kind as documents, in the order that a virtual shard reads them in."""

import collections
import dataclasses
import functools
import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data_pipelines import cutting, filters, image_files, pairs
from data_pipelines.augmentation import BEYOND_MAX_TURNS
from data_pipelines.cache import Cache
from data_pipelines.kinds import CONVERSATIONS, KINDS
from data_pipelines.order import EpochOrder
from data_pipelines.rejection import MOST_BARREN, BadRow, Rejected
from data_pipelines.row_groups import RowGroups
from data_pipelines.rows import open_rows, read_row
from data_pipelines.source_config import SourceConfig
from idefics_jax.documents import Document
from idefics_jax.errors import UserError

# After so many missing images and not one that was found, the folder is taken to be the wrong one.
_MOST_MISSING = 256
# Epochs without a document after which a source of less than MOST_BARREN rows is taken to have none.
_BARREN_EPOCHS = 10


class DocumentSource:
    """A source's rows as endless, shuffled sequences with random access, one for each virtual shard."""

    def __init__(
        self,
        config: SourceConfig,
        *,
        prepare: Callable[[Document], Any],
        prepared_size: Callable[[Any], int],
        cache: Cache,
        row_groups: RowGroups,
        seed: int,
        shards: int,
        shards_here: int,
    ):
        """Opens the files.

        Args:
          config: what to read.
          prepare: applied to each document; it may return Rejected. Rejected rows pass it by.
          prepared_size: bytes that what it returned takes in the cache.
          cache: keeps elements between epochs.
          row_groups: memory for those of parquet files.
          seed: of the order.
          shards: how many share an epoch.
          shards_here: how many of them this process reads.

        Raises:
          UserError: files or the folder of images are missing, files have other columns, or there are fewer documents
            than shards.
        """
        self._config = config
        self._prepare = prepare
        self._prepared_size = prepared_size
        self._cache = cache
        self._seed = seed
        self._rows = open_rows(config, row_groups)
        count = int(self._rows.group_rows.sum())
        if count < shards:
            raise UserError(
                f"source {config.name!r} has {count} documents for {shards} shards; lower data.virtual_shards or give "
                "it more data"
            )
        self._order = EpochOrder(self._rows.group_rows, window=config.window, seed=seed, shards=shards)
        # Rows since the last that gave a document, by what became of them.
        self._barren: collections.Counter[str] = collections.Counter()
        # Until an image is found: rows read, and images missing of them.
        self._is_found, self._looked, self._missing = False, 0, 0
        # With a share of few rows, chance may have left them all without images.
        self._whole = count if shards_here == shards else math.inf
        self._lock = threading.Lock()

    @property
    def group_rows(self) -> np.ndarray:
        """int64 [groups]: the rows of each row group."""
        return self._rows.group_rows

    @property
    def files(self) -> int:
        """How many files it has."""
        return self._rows.files

    @property
    def faults(self) -> tuple[str, ...]:
        """A sentence for each file that cannot be read at all, whose rows are rejected as they come."""
        return self._rows.faults

    @property
    def lost(self) -> float:
        """The share of its documents that are in those; of parquet files, whose rows are not known then, of files."""
        return self._rows.lost

    @property
    def digest(self) -> str:
        """Of what is known of the files without reading them: the sizes of row groups, and what the files tell.

        Where pages may lack images (document_max_missing_images), of which images there are too.
        """
        told = repr(self.group_rows.tolist()) + self._rows.digest
        if self._config.image_root is not None and self._config.filters.document_max_missing_images is not None:
            told += image_files.digest(self._config.image_root)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def epoch_rows(self, shard: int) -> int:
        """Returns how many rows a shard reads in an epoch."""
        return self._order.length(shard)

    def read(self, shard: int, index: int) -> tuple[Any, ...]:
        """Returns what the index-th row of a shard gives: a document, several where a long one is cut, or Rejected.

        Raises:
          UserError: this row and very many before it gave no document.
        """
        epoch, *place = self._order(shard, index)
        random = self._config.is_random
        seed = (self._seed, epoch if random else 0, *place)
        if random:
            pieces = self._make(*place, seed)
        else:
            size = functools.partial(_total, self._prepared_size)
            pieces = self._cache.get((self._config, *place), lambda: self._make(*place, seed), size)
        self._check_not_barren(pieces)
        return pieces

    def _check_not_barren(self, pieces: tuple[Any, ...]) -> None:
        with self._lock:
            if not all(isinstance(piece, Rejected) for piece in pieces):
                self._barren.clear()
                return
            self._barren[pieces[0].reason] += 1
            count = self._barren.total()
            if count < min(MOST_BARREN, _BARREN_EPOCHS * int(self.group_rows.sum())):
                return
            reasons = ", ".join(f"{reason} {count}" for reason, count in self._barren.most_common())
        raise UserError(
            f"source {self._config.name!r} gave no document in {count} rows one after another ({reasons}), the "
            f"last being {pieces[0].name}: {pieces[0].message}; look at its image_root and filters, or take it out"
        )

    def _check_some_are_found(self, values: dict[str, Any], taken: collections.Counter[str]) -> None:
        """Raises UserError where pages may lack images (document_max_missing_images) and every image is missing."""
        if self._is_found:
            return
        missing = taken[filters.MISSING]
        with self._lock:
            self._is_found |= taken.total() > missing or any(image is not None for image in values.get("images") or ())
            self._looked, self._missing = self._looked + 1, self._missing + missing
            is_wrong = self._missing >= _MOST_MISSING or (self._missing and self._looked >= self._whole)
            looked, missing = self._looked, self._missing
        if is_wrong and not self._is_found:
            raise UserError(
                f"source {self._config.name!r}: not one of the {missing} images that its first {looked} documents "
                f"name is found in image_root = {self._config.image_root!r}; name the folder that holds them, or the "
                "folder of their index"
            )

    def _make(self, group: int, row: int, seed: tuple[int, ...]) -> tuple[Any, ...]:
        values = read_row(self._config, self._rows, group, row)
        if isinstance(values, Rejected):
            return (values,)
        augmentation, kind = self._config.augmentation, KINDS[self._config.kind]
        name = self._rows.name(group, row)
        left_out = 0
        try:
            if augmentation.of_turns_alone:
                every = kind.turns(values)
                turns = augmentation.of_turns(every, np.random.default_rng(seed))
                values, left_out = kind.with_turns(values, turns), len(every) - len(turns)
            draw = np.random.default_rng((*seed, 2)).random() if len(self._config.captions) > 1 else 0.0
            values, taken = _filtered(self._config, values, draw)
            units = max(1, kind.units(values))
        except BadRow as error:
            return (Rejected(f"{self._config.name}/{name}", error.reason, str(error)),)

        self._check_some_are_found(values, taken)

        cut_short: dict[int, Rejected] = {}

        def prepared(row: dict[str, Any], piece: str, *, open_end: bool = False) -> Any:
            document = _document(self._config, row, piece)
            if isinstance(document, Rejected):
                return document
            if open_end:  # the answer goes on where it stops, so that what ends it is not to be learnt
                document = dataclasses.replace(document, parts=document.parts[:-1], ends=False)
            if augmentation.is_random_of_images:  # to make a generator takes as long as to read a record
                document = augmentation.of_document(document, np.random.default_rng((*seed, 1)))
            return self._prepare(document)

        def make(first: int, end: int) -> Any:
            whole = end - first == units
            row, piece = (values, name) if whole else (kind.piece(values, first, end), f"{name}[{first}:{end}]")
            found = prepared(row, piece)
            if end - first > 1 or self._config.kind not in CONVERSATIONS or not cutting.is_too_large(found):
                return found
            shorter = _with_part_of_the_answer(kind, row, lambda row: prepared(row, piece, open_end=True))
            if shorter is None:
                return found
            what = "its answer is longer than a row holds; raise document_tokens for the whole of it"
            cut_short[first] = Rejected(f"{self._config.name}/{piece}", cutting.CUT_SHORT, what)
            return shorter

        taken[BEYOND_MAX_TURNS] = left_out
        taken_out = [Rejected(f"{self._config.name}/{name}", reason, "a part of it") for reason in taken.elements()]
        return (*cutting.cut(units, make), *cut_short.values(), *taken_out)


def _with_part_of_the_answer(kind: Any, row: dict[str, Any], prepare: Callable[[dict[str, Any]], Any]) -> Any | None:
    """Prepares a conversation of one turn with the most of its answer that is not too large; None if there is none."""
    (turn,) = kind.turns(row)
    if turn.get("choices"):  # the answer is one of them, whole
        return None
    return cutting.beginning(
        turn["assistant"], lambda answer: prepare(kind.with_turns(row, [{**turn, "assistant": answer}]))
    )


def _total(size: Callable[[Any], int], pieces: tuple[Any, ...]) -> int:
    return sum(map(size, pieces))


def read_documents(config: SourceConfig) -> Iterator[Document]:
    """Yields every document of a source once, in the order of its files: for evaluation.

    Raises:
      UserError: the files are missing or have other columns, or a row holds no document.
    """
    rows = open_rows(config, RowGroups(max_bytes=0))
    for group, count in enumerate(rows.group_rows):
        for row in range(count):
            document = read_row(config, rows, group, row)
            if not isinstance(document, Rejected):
                name = rows.name(group, row)
                document = _document(config, pairs.with_caption(document, config.captions, 0.0), name)
            if isinstance(document, Rejected):
                raise UserError(f"{document.name} cannot be used ({document.message}); mend it or drop the row")
            yield document


def _filtered(
    config: SourceConfig, values: dict[str, Any], draw: float
) -> tuple[dict[str, Any], collections.Counter[str]]:
    """Returns a row with its caption chosen and without what the filters take, and what they took; raises BadRow."""
    values = pairs.with_caption(values, config.captions, draw)
    if not config.filters.named:
        return values, collections.Counter()
    kind = KINDS[config.kind]
    whole = kind.with_images(values, config.image_root, max_missing=config.filters.document_max_missing_images)
    kept, taken = filters.apply(config.filters, whole, config.kind)
    taken[filters.MISSING] += len(values.get("images") or ()) - len(whole.get("images") or ())
    return kept, taken


def _document(config: SourceConfig, values: dict[str, Any], name: str) -> Document | Rejected:
    """Makes a document of a row's columns, or of a piece of them."""
    try:
        return Document(KINDS[config.kind].parts(values, config.image_root), source=config.name, id=name)
    except BadRow as error:
        return Rejected(f"{config.name}/{name}", error.reason, str(error))
