"""Readers: files in a published form as a stream of rows, for preparation (prepare.py).

A reader is `read(path, kind)`, which yields (id, row) in the file's order; a row that cannot be read is a Rejected in
its place. The file's name chooses it. Training needs random access, and so reads parquet, prepared shards and TFDS sets
alone.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipelines import jsonl, parquet, rows, tar, tfds_source
from data_pipelines.filters import PERPLEXITY
from data_pipelines.rejection import Rejected
from idefics_jax.errors import UserError

Row = dict[str, Any]
Reader = Callable[[str, str], Iterator[tuple[str, Row | Rejected]]]

# Rows of parquet that are in memory as tables; their images may be large.
_BATCH = 16


def read_parquet(path: str, kind: str) -> Iterator[tuple[str, Row | Rejected]]:
    """Yields (id, row) for the rows of a parquet file; the id is "file:row".

    Of a row group that breaks off, the rows before are given and the others are Rejected. A file that is no parquet at
    all is one Rejected.

    Args:
      path: a parquet file.
      kind: a name in kinds.KINDS, whose columns it has. A perplexity comes along, and every text of pairs.

    Raises:
      UserError: it has other columns.
    """
    name, first = Path(path).name, 0
    try:
        (footer,) = parquet.read_footers([path])
    except UserError as error:
        yield name, Rejected(name, "broken-parquet", str(error))
        return
    columns = parquet_columns(footer, kind)
    with parquet.open_file(path) as file:
        for group, rows in enumerate(footer.group_rows):
            row = first
            try:
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
                    for i in range(batch.num_rows):
                        yield f"{name}:{row}", _values(batch, i, f"{name}:{row}")
                        row += 1
            except parquet.DAMAGED as error:
                for lost in range(row, first + rows):
                    sentence = f"its row group cannot be read ({error})"
                    yield f"{name}:{lost}", Rejected(f"{name}:{lost}", "damaged-parquet", sentence)
            first += rows


def _values(batch: pa.RecordBatch, row: int, name: str) -> Row | Rejected:
    try:
        return {column: batch.column(column)[row].as_py() for column in batch.schema.names}
    except UnicodeDecodeError:
        return Rejected(name, "not-utf8", "a text is not UTF-8; write it again")


def parquet_columns(footer: parquet.Footer, kind: str) -> list[str]:
    """Returns the columns that preparation reads; raises UserError if the kind's own are not there."""
    needed = rows.columns_of(footer, kind, where=footer.path)
    texts = [field.name for field in footer.schema if parquet.reads_as(field.type, pa.string())]
    extras = [PERPLEXITY, *texts] if kind == "pairs" else [PERPLEXITY]
    return [*needed, *(name for name in extras if name in footer.schema.names and name not in needed)]


# What a file's name ends in -> its reader.
READERS: dict[str, Reader] = {
    ".parquet": read_parquet,
    ".tar": tar.read,
    ".jsonl": jsonl.read,
    ".jsonl.gz": jsonl.read,
}


def reader_of(path: str, features: Mapping[str, str]) -> Reader:
    """Returns the reader of a file; raises UserError if there is none for its name.

    Args:
      path: of the file.
      features: field of a row -> feature, for a shard of a TFDS set (tfds_source.FIELDS).
    """
    if tfds_source.is_shard(path):
        return functools.partial(tfds_source.read, features=features)
    for suffix, reader in READERS.items():
        if path.endswith(suffix):
            return reader
    known = f"{', '.join(READERS)}, or TFDS shards"
    raise UserError(f"{path}: no reader is known for its name; give files that end in {known}")
