"""Sources: parquet files in a published schema, prepared shards, or TFDS sets, read as documents."""

import collections
import dataclasses
import functools
import hashlib
import math
import os
import shlex
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines import (
    cauldron,
    cutting,
    filters,
    manifest,
    messages,
    obelics,
    pages,
    pairs,
    parquet,
    records,
    tfds_source,
)
from data_pipelines.augmentation import BEYOND_MAX_TURNS, Augmentation
from data_pipelines.cache import Cache
from data_pipelines.filters import Filters
from data_pipelines.image_files import check_root
from data_pipelines.order import EpochOrder
from data_pipelines.rejection import MOST_BARREN, BadRow, Rejected
from data_pipelines.row_groups import RowGroups
from idefics_jax.documents import Document
from idefics_jax.errors import UserError

# Kind -> the module that knows its schema and turns its rows into documents.
KINDS = {"cauldron": cauldron, "obelics": obelics, "pairs": pairs, "pdf": pages, "text": messages}
# The rows of these are conversations: their modules also have `turns` and `with_turns`.
CONVERSATIONS = ("cauldron", "text")
# Rows at random: `group_rows`, `name(group, row)` and `row(group, row)`.
Rows = parquet.ParquetRows | records.RecordRows | tfds_source.TfdsRows
# What the names of files end in that preparation reads and training cannot.
SEQUENTIAL = (".tar", ".jsonl", ".jsonl.gz")
# After so many missing images and not one that was found, the folder is taken to be the wrong one.
_MOST_MISSING = 256
# Epochs without a document after which a source of less than MOST_BARREN rows is taken to have none.
_BARREN_EPOCHS = 10

# What a column of a prepared shard holds (training_form.py), as parquet would.
_STORED_AS = {"bytes": pa.binary(), "text": pa.string(), "number": pa.float64()}


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A data set in a mixture.

    Attributes:
      name: what its documents are called in messages and counts.
      kind: the schema of its files, a name in KINDS.
      paths: parquet files, what data_pipelines.prepare wrote (its folders, or shards in them), or the shards of a TFDS
        set, as paths or globs.
      weight: its share of the documents, relative to the other sources' weights.
      image_root: folder or index of the images that rows name instead of holding (image_files.py); None if there are
        none.
      window: row groups whose rows are shuffled together.
      augmentation: what chance changes about its documents.
      filters: what is taken out of it. An image that is taken out of a page is counted as a rejected document is.
      captions: (column, share of the documents) of each text that chance takes for a pair's caption; none for the
        column `caption` alone. A pair without the text drawn has another of them (pairs.with_caption).
      features: (field, feature) of each field of a row that a TFDS set calls otherwise than tfds_source.FIELDS does.
      document_tokens: the most tokens of one of its documents, if that is less than `data.document_tokens`.
    """

    name: str
    kind: str
    paths: tuple[str, ...]
    weight: float = 1.0
    image_root: str | None = None
    window: int = 4
    augmentation: Augmentation = Augmentation()
    filters: Filters = Filters()
    captions: tuple[tuple[str, float], ...] = ()
    features: tuple[tuple[str, str], ...] = ()
    document_tokens: int | None = None

    def __post_init__(self):
        where = f"source {self.name!r}"
        if self.kind not in KINDS:
            raise UserError(f"{where}: kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if not self.paths:
            raise UserError(f"{where}: paths is empty; name its parquet files")
        if self.image_root is not None and "://" in self.image_root:
            raise UserError(
                f"{where}: image_root is {self.image_root!r}; images are read from a disk: mount the bucket (gcsfuse), "
                "or copy it"
            )
        if not 0 < self.weight < float("inf"):
            raise UserError(f"{where}: weight is {self.weight!r}; it must be a positive number")
        of_turns = ", ".join(self.augmentation.of_turns_alone)
        if of_turns and self.kind not in CONVERSATIONS:
            raise UserError(f"{where}: {of_turns} is for kind {' or '.join(CONVERSATIONS)}, not {self.kind!r}")
        if self.document_tokens is not None and self.document_tokens < 1:
            raise UserError(f"{where}: document_tokens is {self.document_tokens!r}; it must be at least 1, or None")
        if self.window < 1:
            raise UserError(f"{where}: window is {self.window!r}; it must be at least 1 row group")
        filters.check_kind(self.filters, self.kind, where=where)
        if self.captions and self.kind != "pairs":
            raise UserError(f"{where}: captions are for kind 'pairs', not {self.kind!r}; take them out")
        for column, share in self.captions:
            if not 0 < share < float("inf"):
                raise UserError(f"{where}: the share of caption {column!r} is {share!r}; it must be a positive number")

    @property
    def is_random(self) -> bool:
        """Whether a row may give another document in another epoch."""
        return self.augmentation.is_random or len(self.captions) > 1


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
        self._rows = _open_rows(config, row_groups)
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
        """Of what is known of the files without reading them: the sizes of row groups, and what the files tell."""
        told = repr(self.group_rows.tolist()) + self._rows.digest
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
        values = _values(self._config, self._rows, group, row)
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
                document = dataclasses.replace(document, parts=document.parts[:-1])
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
    rows = _open_rows(config, RowGroups(max_bytes=0))
    for group, count in enumerate(rows.group_rows):
        for row in range(count):
            document = _values(config, rows, group, row)
            if not isinstance(document, Rejected):
                name = rows.name(group, row)
                document = _document(config, pairs.with_caption(document, config.captions, 0.0), name)
            if isinstance(document, Rejected):
                raise UserError(f"{document.name} cannot be used ({document.message}); mend it or drop the row")
            yield document


def find_files(config: SourceConfig) -> list[str]:
    """Returns the paths of a source's files, unread; raises UserError where one, or its images' folder, is missing."""
    where = f"source {config.name!r}"
    check_root(config.image_root, where=f"{where}: image_root")
    return parquet.expand(config.paths, where=f"{where}: paths")


def _open_rows(config: SourceConfig, row_groups: RowGroups) -> Rows:
    where, paths = f"source {config.name!r}", find_files(config)
    forms = {_form(path) for path in paths}
    if len(forms) > 1:
        mixed = " with ".join(form for form in _OPEN if form in forms)
        raise UserError(f"{where} mixes {mixed}; make a source of each")
    (form,) = forms
    if config.features and form != "TFDS shards":
        raise UserError(f"{where}: features are for TFDS sets, and its paths name {form}; take them out")
    rows = _OPEN[form](config, paths, row_groups)
    if not rows.group_rows.sum():
        raise UserError(f"{where}: {', '.join(config.paths)} hold no rows; name files that do")
    return rows


def _form(path: str) -> str:
    """Says what a path leads to, by its name."""
    if tfds_source.is_shard(path):
        return "TFDS shards"
    return "prepared shards" if path.endswith(manifest.SUFFIX) or os.path.isdir(path) else "other files"


def _open_tfds(config: SourceConfig, paths: list[str], _: RowGroups) -> tfds_source.TfdsRows:
    rows = tfds_source.TfdsRows(paths, config.kind, dict(config.features))
    _further_columns(config, dict.fromkeys(rows.fields, pa.string()), paths[0])
    return rows


def _open_parquet(config: SourceConfig, paths: list[str], row_groups: RowGroups) -> parquet.ParquetRows:
    for path in paths:
        if path.endswith(SEQUENTIAL):
            raise UserError(
                f"{path} of source {config.name!r} can only be read from end to end; prepare it (python -m "
                f"data_pipelines.prepare --kind {config.kind} --input {shlex.quote(path)} --output FOLDER) and name "
                "that folder"
            )
    footers = parquet.footers_or_faults(paths)
    columns = []
    for footer in footers:
        if footer.fault:
            continue
        needed = columns_of(footer, config.kind, where=f"{footer.path} of source {config.name!r}")
        there = {field.name: field.type for field in footer.schema}
        columns.append(list(dict.fromkeys(needed + _further_columns(config, there, footer.path))))
    if len({tuple(name for name in names if name != pairs.STATUS.name) for names in columns}) > 1:
        raise UserError(f"source {config.name!r} mixes files with different columns; make a source of each")
    return parquet.ParquetRows(footers, max(columns, key=len), kept=row_groups)


def _open_shards(config: SourceConfig, paths: list[str], _: RowGroups) -> records.RecordRows:
    manifests = manifest.load_all(paths)
    for found in manifests:
        if found.kind != config.kind:
            raise UserError(
                f"{found.path} of source {config.name!r} says kind {found.kind!r}, not {config.kind!r}: set kind to "
                f"{found.kind!r}"
            )
    common = set.intersection(*(set(found.columns) for found in manifests))
    columns = {name: form for name, form in manifests[0].columns.items() if name in common}
    there = {name: _STORED_AS[form] for name, form in columns.items() if isinstance(form, str)}
    _further_columns(config, there, manifests[0].path)
    return records.RecordRows([shard for found in manifests for shard in found.shards], columns)


def _further_columns(config: SourceConfig, there: dict[str, pa.DataType], path: Any) -> list[str]:
    """Returns the columns that captions and filters need; raises UserError if they are not there."""
    needed = pa.schema([*((column, pa.string()) for column, _ in config.captions), *config.filters.columns])
    for field in needed:
        if field.name not in there or not parquet.reads_as(there[field.name], field.type):
            what = "captions" if field.name in dict(config.captions) else "filters"
            raise UserError(
                f"{path} of source {config.name!r} has no column {field.name} {field.type}, which its {what} need; it "
                f"has {', '.join(f'{name} {kind}' for name, kind in there.items())}"
            )
    return needed.names


_OPEN = {"TFDS shards": _open_tfds, "prepared shards": _open_shards, "other files": _open_parquet}


def columns_of(footer: parquet.Footer, kind: str, *, where: str) -> list[str]:
    """Returns the columns to read of a parquet file of a kind; raises UserError if they are not there.

    Args:
      footer: of the file.
      kind: a name in KINDS.
      where: opens the message.
    """
    schema = footer.schema
    for needed in KINDS[kind].NEEDED:
        if _has(schema, needed):
            return needed.names
    others = [kind for kind, module in KINDS.items() if any(_has(schema, needed) for needed in module.NEEDED)]
    accepted = "; ".join(f"{kind}: {_show(module.SCHEMA)}" for kind, module in KINDS.items())
    raise UserError(
        f"{where} has the columns {_show(schema)}, which are not those of kind {kind!r}: "
        f"{f'set kind to {others[0]!r}' if others else f'convert it to one of {accepted}'}"
    )


def _has(schema: pa.Schema, needed: pa.Schema) -> bool:
    return all(
        field.name in schema.names and parquet.reads_as(schema.field(field.name).type, field.type) for field in needed
    )


def _show(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _values(config: SourceConfig, rows: Rows, group: int, row: int) -> dict[str, Any] | Rejected:
    """Reads a row's columns."""
    name = f"{config.name}/{rows.name(group, row)}"
    try:
        return rows.row(group, row)
    except UnicodeDecodeError:
        return Rejected(name, "not-utf8", "a text is not UTF-8; write it again")
    except parquet.DAMAGED as error:
        return Rejected(name, "damaged-parquet", f"its row group cannot be read ({error})")
    except BadRow as error:
        return Rejected(name, error.reason, str(error))


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
