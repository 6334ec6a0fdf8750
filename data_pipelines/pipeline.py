"""The input pipeline: sources -> shuffle -> mix -> encode -> pack -> decode, on Grain.

    sources   parquet files in a published schema, each an endless shuffled sequence of documents
    mix       by weight, in stages; still a sequence that any index of can be computed
    encode    ids and patch counts; images are measured, not decoded
    pack      documents chosen for each row, by size
    decode    images to uint8 patches

The same config, files and number of processes give the same batches, and the iterator's state brings back any
position to the bit. Threads read ahead and decode; their number changes nothing.
"""

import dataclasses
import functools
import hashlib
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain

from data_pipelines.batches import DecodeIterDataset, Packing, PackIterDataset, encode, encoded_size
from data_pipelines.cache import Cache
from data_pipelines.sources import DocumentSource, SourceConfig
from idefics_jax.batch import BatchShape
from idefics_jax.errors import UserError
from idefics_jax.processor import Processor


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of training with a mixture of its own.

    Attributes:
      sources: what is mixed, each document coming from one of them by their weights.
      documents: how many documents the stage lasts, over all processes; None for the rest of training.
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
      seed: of the order of documents and of packing.
      shape: sizes of a batch; its rows are those of all processes together.
      lookahead: documents that wait to be chosen from; more fill rows better and hold more encoded images in memory.
      rounds: attempts to improve each row (packing.pack_row).
      max_bad_fraction: share of documents that may be rejected before the run stops, in [0, 1).
      num_threads: threads that read, and as many that decode; 0 for none.
      prefetch: batches made ahead, in a thread of its own; at least 1.
      cache_mib: memory for documents kept encoded and decoded, in MiB; for data small enough to be read many times.
    """

    stages: tuple[Stage, ...]
    seed: int
    shape: BatchShape
    lookahead: int
    rounds: int
    max_bad_fraction: float
    num_threads: int
    prefetch: int
    cache_mib: int

    def __post_init__(self):
        for name, least in (
            ("seed", 0),
            ("lookahead", 1),
            ("rounds", 0),
            ("num_threads", 0),
            ("prefetch", 1),
            ("cache_mib", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.max_bad_fraction < 1:
            raise UserError(f"data.max_bad_fraction is {self.max_bad_fraction}; it must be at least 0 and less than 1")
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


def batches(config: DataConfig, processor: Processor, *, shard_index: int, shard_count: int) -> grain.DatasetIterator:
    """Returns the endless iterator over this process's share of every batch, as PackedBatch.

    Args:
      config: what to read.
      processor: tokenizer and image rules.
      shard_index: which process this is, from 0.
      shard_count: how many there are; it must divide the rows of a batch.

    Returns:
      A Grain iterator: `get_state` and `set_state` hold and restore its position, and grain.checkpoint saves it.

    Raises:
      UserError: the settings do not fit together, or files are missing or have other columns. While iterating: too
        many documents are rejected.
    """
    shape = _share(config.shape, processor, shard_count)
    cache = Cache(config.cache_mib * 2**20)
    opened = [
        [
            DocumentSource(
                source,
                prepare=functools.partial(encode, processor=processor, shape=shape),
                prepared_size=encoded_size,
                cache=cache,
                seed=zlib.crc32(source.name.encode(), config.seed),
                shard_index=shard_index,
                shard_count=shard_count,
            )
            for source in stage.sources
        ]
        for stage in config.stages
    ]
    documents = _in_stages(config.stages, opened, shard_count)
    packing = Packing(
        shape=shape,
        lookahead=config.lookahead,
        rounds=config.rounds,
        seed=config.seed,
        max_bad_fraction=config.max_bad_fraction,
        num_threads=config.num_threads,
        identity=_identity(config, opened, processor, shard_index, shard_count),
    )
    indexed = documents.map_with_index(lambda index, pieces: (index, pieces))
    decoded = DecodeIterDataset(PackIterDataset(indexed, packing), packing, processor=processor, cache=cache)
    return iter(grain.experimental.ThreadPrefetchIterDataset(decoded, prefetch_buffer_size=config.prefetch))


def _share(shape: BatchShape, processor: Processor, shard_count: int) -> BatchShape:
    """Returns the shape of one process's share."""
    numbers = processor.image_rules.patch_size**2 * 3
    if shape.patch_dim != numbers:
        raise UserError(f"data.shape.patch_dim is {shape.patch_dim}; the processor's patches have {numbers} numbers")
    if shape.rows % shard_count:
        raise UserError(f"data.shape.rows is {shape.rows}; it must be a multiple of the {shard_count} processes")
    return dataclasses.replace(shape, rows=shape.rows // shard_count)


class _StageOfIndex:
    """Maps an index to (stage, index within the stage), for grain.MapDataset.select_from_datasets."""

    def __init__(self, lengths: Sequence[int]):
        self._lengths = lengths

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        for stage, length in enumerate(self._lengths):
            if index < length:
                return stage, index
            index -= length
        return len(self._lengths), index


def _in_stages(stages: tuple[Stage, ...], opened: list[list[DocumentSource]], shard_count: int) -> grain.MapDataset:
    """Returns the endless sequence of documents: each stage's mixture, one stage after another."""
    mixtures = [
        grain.MapDataset.mix(
            [grain.MapDataset.source(source) for source in sources], [source.weight for source in stage.sources]
        )
        for stage, sources in zip(stages, opened, strict=True)
    ]
    lengths = [-(-stage.documents // shard_count) for stage in stages[:-1]]
    return grain.MapDataset.select_from_datasets(mixtures, _StageOfIndex(lengths))


def _identity(
    config: DataConfig,
    opened: list[list[DocumentSource]],
    processor: Processor,
    shard_index: int,
    shard_count: int,
) -> str:
    """Returns a digest of everything the batches depend on; threads, read-ahead and cache are not among it."""
    settings = dataclasses.replace(config, num_threads=0, prefetch=1, cache_mib=0)
    rows = [[source.group_rows.tolist() for source in sources] for sources in opened]
    tokenizer = hashlib.sha256(processor.tokenizer.model).hexdigest()
    told = repr((settings, rows, tokenizer, processor.image_rules, processor.num_latents, shard_index, shard_count))
    return hashlib.sha256(told.encode()).hexdigest()[:16]
