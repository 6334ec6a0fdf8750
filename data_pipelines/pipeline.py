"""The input pipeline: sources -> shuffle -> mix -> encode -> pack -> decode, on Grain.

    sources   files of documents, each source an endless shuffled sequence
    mix       by weight, in stages; still a sequence that any index of can be computed
    encode    ids and patch counts; images are measured, not decoded
    pack      documents chosen for each row, by size
    decode    images to uint8 patches

All but the last happens in virtual shards, each with a share of every epoch and of every batch's rows. A process holds
some of them, so the same config and files give the same batches on any number of processes that divides the shards,
and the shards' states bring back any position to the bit, on that or another number. Threads read ahead and decode;
their number changes nothing.
"""

import dataclasses
import functools
import hashlib
import json
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import grain
from absl import logging

from data_pipelines import position
from data_pipelines.ahead import AheadIterDataset
from data_pipelines.batches import DecodeIterDataset, Decoding
from data_pipelines.cache import Cache
from data_pipelines.mixture import Mixture
from data_pipelines.packed_rows import Packing, PackIterDataset, encode, encoded_size
from data_pipelines.rejection import DAMAGED_FILE
from data_pipelines.row_groups import RowGroups
from data_pipelines.rows import find_files
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import DocumentSource
from idefics_jax.batch import BatchShape
from idefics_jax.errors import UserError
from idefics_jax.processor import Processor

# Settings that change no batch: a run goes on with others.
FREE = ("max_bad_fraction", "num_threads", "prefetch", "row_groups_mib", "cache_mib")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of training with a mixture of its own.

    Attributes:
      sources: what is mixed, each document coming from one of them by their weights.
      documents: how many documents the stage lasts, over all shards; None for the rest of training.
    """

    sources: tuple[SourceConfig, ...]
    documents: int | None = None

    def __post_init__(self):
        names = [source.name for source in self.sources]
        if not names:
            raise UserError("data.stages: a stage has no sources; name at least one")
        if len(set(names)) < len(names):
            raise UserError(f"data.stages: the sources {', '.join(names)} share a name; give each its own")
        if self.documents is not None and self.documents < 1:
            raise UserError(f"data.stages: documents is {self.documents}; it must be at least 1, or None")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes batches.

    Attributes:
      stages: one after another; only the last has no number of documents.
      after: work directory of an ended run: sources that it read too go on from where it left them, and are not begun
        anew. None to begin all of them.
      seed: of the order of documents and of packing.
      shape: sizes of a batch; its rows are those of all processes together.
      document_tokens: the most tokens of a document, at most those of a row; longer ones are cut. A source may
        say less.
      virtual_shards: how many independent parts every epoch and every batch is made of. It must divide the rows of a
        batch, and be a multiple of every number of processes that the run may use.
      lookahead: documents that wait to be chosen from, in each shard; more fill rows better.
      lookahead_mib: the most that they may take, encoded, in each shard, in MiB.
      rounds: attempts to improve each row (packing.pack_row).
      max_bad_fraction: share of documents that may be rejected before the run stops, in [0, 1).
      num_threads: threads that read, and as many that decode; 0 for none.
      prefetch: batches made ahead in a thread of its own, the one under way included; at least 1.
      row_groups_mib: memory for row groups of parquet files, of all sources together, in MiB.
      cache_mib: memory for documents kept encoded and decoded, in MiB; for data small enough to be read many times.
    """

    stages: tuple[Stage, ...]
    seed: int
    shape: BatchShape
    document_tokens: int
    virtual_shards: int
    lookahead: int
    lookahead_mib: int
    rounds: int
    max_bad_fraction: float
    num_threads: int
    prefetch: int
    row_groups_mib: int
    cache_mib: int
    after: str | None = None

    def __post_init__(self):
        for name, least in (
            ("seed", 0),
            ("document_tokens", 1),
            ("virtual_shards", 1),
            ("lookahead", 1),
            ("lookahead_mib", 1),
            ("rounds", 0),
            ("num_threads", 0),
            ("prefetch", 1),
            ("row_groups_mib", 1),
            ("cache_mib", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.max_bad_fraction < 1:
            raise UserError(f"data.max_bad_fraction is {self.max_bad_fraction}; it must be at least 0 and less than 1")
        if self.document_tokens > self.shape.tokens:
            raise UserError(
                f"data.document_tokens is {self.document_tokens}; a row, data.shape.tokens, has {self.shape.tokens}"
            )
        if self.shape.rows % self.virtual_shards:
            raise UserError(
                f"data.shape.rows is {self.shape.rows}; it must be a multiple of data.virtual_shards = "
                f"{self.virtual_shards}"
            )
        if not self.stages or self.stages[-1].documents is not None:
            raise UserError("data.stages: the last stage must have documents = None; it lasts to the end of training")
        if any(stage.documents is None for stage in self.stages[:-1]):
            raise UserError("data.stages: every stage but the last must say how many documents it lasts")
        self._check_names()

    def _check_names(self):
        known: dict[str, SourceConfig] = {}
        for source in (source for stage in self.stages for source in stage.sources):
            same = dataclasses.replace(source, weight=1.0)
            if known.setdefault(source.name, same) != same:
                raise UserError(f"data.stages: two sources are called {source.name!r}; give each its own name")


def in_order(values: Any) -> Any:
    """Turns the groups of stages and sources of a config file into the tuples that DataConfig holds.

    Stages come in the order of their names, and a source gets its own. What is no group stays as it is, for
    settings.build to refuse.
    """
    stages = values.get("stages") if isinstance(values, Mapping) else None
    if not isinstance(stages, Mapping) or not all(isinstance(stage, Mapping) for stage in stages.values()):
        return values

    def named(sources: Any) -> Any:
        if not isinstance(sources, Mapping) or not all(isinstance(source, Mapping) for source in sources.values()):
            return sources
        return tuple({"name": name, **source} for name, source in sorted(sources.items()))

    ordered = tuple({**stage, "sources": named(stage.get("sources"))} for _, stage in sorted(stages.items()))
    return {**values, "stages": ordered}


def batches(
    config: DataConfig, processor: Processor, *, process_index: int, process_count: int
) -> grain.DatasetIterator:
    """Returns the endless iterator over this process's rows of every batch, as PackedBatch.

    Args:
      config: what to read.
      processor: tokenizer and image rules.
      process_index: which process this is, from 0. Its rows stand before those of the next.
      process_count: how many there are; it must divide config.virtual_shards.

    Returns:
      A Grain iterator: `get_state` and `set_state` hold and restore its position (batches.py).

    Raises:
      UserError: the settings do not fit together, or files are missing or have other columns, or those that cannot be
        read hold more than `max_bad_fraction` of the documents. While iterating: too many documents are rejected.
    """
    _check(config, processor, process_count)
    each = config.virtual_shards // process_count
    shards = range(process_index * each, (process_index + 1) * each)
    cache = Cache(config.cache_mib * 2**20)
    opened = _open(config, processor, cache, shards_here=each)
    _check_files_are_whole(config, opened)
    about = _about(config, opened, processor)
    workers = {"num_threads": config.num_threads, "prefetch": config.prefetch, "processes": process_count}
    starts = position.reached(config.after, shards, about) if config.after else [position.Reached({}, (), ())] * each
    packed = [
        _packed(config, opened, shard, start=start, threads=-(-config.num_threads // each))
        for shard, start in zip(shards, starts, strict=True)
    ]
    decoding = Decoding(
        shards=tuple(shards),
        shape=dataclasses.replace(config.shape, rows=config.shape.rows // process_count),
        epoch_rows={name: sum(map(source.epoch_rows, shards)) for name, source in opened.items()},
        max_bad_fraction=config.max_bad_fraction,
        num_threads=config.num_threads,
        about=json.dumps({**about, "workers": workers}),
    )
    decoded = DecodeIterDataset(packed, decoding, processor=processor, cache=cache)
    return iter(AheadIterDataset(decoded, count=config.prefetch))


def check_files(config: DataConfig, processor: Processor) -> None:
    """Raises UserError where files are missing or the processor's patches are others, and reads none of the files."""
    _check(config, processor, process_count=1)
    for stage in config.stages:
        for source in stage.sources:
            find_files(source)


def _check(config: DataConfig, processor: Processor, process_count: int) -> None:
    numbers = processor.image_rules.patch_size**2 * 3
    if config.shape.patch_dim != numbers:
        raise UserError(
            f"data.shape.patch_dim is {config.shape.patch_dim}; the processor's patches have {numbers} numbers"
        )
    if config.virtual_shards % process_count:
        raise UserError(
            f"data.virtual_shards is {config.virtual_shards}; it must be a multiple of the {process_count} processes"
        )


def _open(config: DataConfig, processor: Processor, cache: Cache, *, shards_here: int) -> dict[str, DocumentSource]:
    """Opens every source once, whatever the stages and shards that read it."""
    row_groups = RowGroups(config.row_groups_mib * 2**20)

    def shape(source: SourceConfig) -> BatchShape:
        most = min(config.document_tokens, source.document_tokens or config.document_tokens)
        return dataclasses.replace(config.shape, rows=1, tokens=most)

    return {
        source.name: DocumentSource(
            dataclasses.replace(source, weight=1.0),
            prepare=functools.partial(encode, processor=processor, shape=shape(source)),
            prepared_size=encoded_size,
            cache=cache,
            row_groups=row_groups,
            seed=zlib.crc32(source.name.encode(), config.seed),
            shards=config.virtual_shards,
            shards_here=shards_here,
        )
        for stage in config.stages
        for source in stage.sources
    }


def _check_files_are_whole(config: DataConfig, opened: Mapping[str, DocumentSource]) -> None:
    """Raises UserError if files that cannot be read hold too large a share of a stage's documents; else names them."""
    for stage in config.stages:
        whole = sum(source.weight for source in stage.sources)
        lost = sum(source.weight / whole * opened[source.name].lost for source in stage.sources)
        faults = [fault for source in stage.sources for fault in opened[source.name].faults]
        if not faults:
            continue
        files = sum(opened[source.name].files for source in stage.sources)
        told = (
            f"{len(faults)} of {files} files cannot be read, about {lost:.2%} of the documents; the first: {faults[0]}"
        )
        if lost > config.max_bad_fraction:
            raise UserError(f"{told}; data.max_bad_fraction = {config.max_bad_fraction} allows less")
        logging.warning("%s; they are left out and counted as %s", told, DAMAGED_FILE)


class _ShardDocuments(grain.MapDataset):
    """A shard's endless sequence of (index, what that row gave)."""

    def __init__(self, shard: int, mixture: Mixture, opened: Mapping[str, DocumentSource]):
        super().__init__()
        self._shard = shard
        self._mixture = mixture
        self._opened = opened

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, tuple[Any, ...]]:
        name, position = self._mixture(index)
        return index, self._opened[name].read(self._shard, position)


def _packed(
    config: DataConfig,
    opened: Mapping[str, DocumentSource],
    shard: int,
    *,
    start: position.Reached,
    threads: int,
) -> PackIterDataset:
    """Returns a shard's rows: what was waiting at `start`, then each source from the position that it had reached."""
    each = config.virtual_shards
    stages = [
        (
            {source.name: source.weight for source in stage.sources},
            None if stage.documents is None else -(-stage.documents // each),
        )
        for stage in config.stages
    ]
    mixture = Mixture(stages, start=start.positions, first=start.waiting, seed=(config.seed, shard))
    packing = Packing(
        shape=dataclasses.replace(config.shape, rows=config.shape.rows // each),
        lookahead=config.lookahead,
        lookahead_bytes=config.lookahead_mib * 2**20,
        rounds=config.rounds,
        seed=(config.seed, shard),
        max_bad_fraction=config.max_bad_fraction,
        num_threads=threads,
    )
    return PackIterDataset(_ShardDocuments(shard, mixture, opened), packing, mixture, left=start.left)


def _about(config: DataConfig, opened: Mapping[str, DocumentSource], processor: Processor) -> dict[str, Any]:
    """Returns everything the batches depend on, as plain JSON; workers, memory and the limit are not among it."""
    settings = dataclasses.asdict(config)
    after, earlier = position.identity(config.after) if config.after else (None, {})
    for name in (*FREE, "stages"):
        del settings[name]
    return {
        "data": settings
        | {
            "stages": {str(i): _told(stage) for i, stage in enumerate(config.stages)},
            "after": after,
        },
        "files": {
            source.name: {"digest": opened[source.name].digest, "seed": config.seed, "window": source.window}
            for stage in config.stages
            for source in stage.sources
        },
        "earlier": {name: told for name, told in earlier.items() if name not in opened},
        "processor": {
            "tokenizer": hashlib.sha256(processor.tokenizer.model).hexdigest()[:16],
            "image_rules": dataclasses.asdict(processor.image_rules),
            "num_latents": processor.num_latents,
        },
    }


def _told(stage: Stage) -> dict[str, Any]:
    sources = {source.name: dataclasses.asdict(source) for source in stage.sources}
    return {"documents": stage.documents, "sources": sources}
