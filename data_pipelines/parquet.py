"""Parquet files as one long list of rows, reached at random without loading them all.

Only footers are read at the start. A row is reached through its row group, and those used last stay in memory
(row_groups.py), so memory does not grow with the corpus. Page checksums are verified where a
file carries them.
"""

import collections
import concurrent.futures
import dataclasses
import glob
import hashlib
import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.rejection import DAMAGED_FILE, BadRow
from data_pipelines.row_groups import RowGroups
from idefics_jax.errors import UserError

# The most that a row group may take in memory. Writers make them of tens to hundreds of MiB; but a column of one long
# text that is the same in every row is stored once, and takes its length for each.
MOST_BYTES = 2**30
_ROWS_AT_ONCE = 64
# What reading a damaged file may raise: of Arrow's errors, ArrowMemoryError too, as a wrong size asks for any memory.
DAMAGED = (OSError, pa.ArrowException)


@dataclasses.dataclass(frozen=True)
class Footer:
    """What a parquet file says of itself.

    Attributes:
      path: the file.
      schema: its columns.
      group_rows: the number of rows of each row group.
      digest: of the footer's bytes, which tell the place, size and range of every page's values.
      fault: why the file cannot be read; then it counts as one row, which is bad, and its columns are not known.
    """

    path: str
    schema: pa.Schema
    group_rows: tuple[int, ...]
    digest: str
    fault: str = ""


class ParquetRows:
    """The rows of a set of parquet files, in the order of the files.

    Attributes:
      group_rows: int64 [groups], the number of rows of each row group.
      digest: of the footers.
      files: how many files there are.
      faults: what is wrong with each file that has no footer.
      lost: share of the files that have none; how many rows they had is not known.
    """

    def __init__(self, footers: Sequence[Footer], columns: Sequence[str], *, kept: RowGroups):
        """Reads nothing yet.

        Args:
          footers: of the files.
          columns: the columns to read; the files may have others, which are left alone. Where a file lacks one, its
            values are null.
          kept: memory for row groups.
        """
        self._columns = list(columns)
        self._folder = os.path.commonpath([os.path.dirname(os.path.abspath(footer.path)) for footer in footers])
        self.digest = hashlib.sha256("".join(footer.digest for footer in footers).encode()).hexdigest()
        self._groups = [(footer.path, group) for footer in footers for group in range(len(footer.group_rows))]
        self.group_rows = np.array([rows for footer in footers for rows in footer.group_rows], np.int64)
        self._first_rows = [
            first for footer in footers for first in itertools.accumulate(footer.group_rows[:-1], initial=0)
        ]
        self._faults = {footer.path: footer.fault for footer in footers if footer.fault}
        self.files, self.faults = len(footers), tuple(self._faults.values())
        self.lost = len(self.faults) / self.files
        self._too_large: dict[int, str] = {}  # row groups that were given up, and why
        self._kept = kept
        self._lock = threading.Lock()  # so that no two threads load the same

    def name(self, group: int, row: int) -> str:
        """Returns "file:row": the file from the folder that holds all of them, the row from the file's start."""
        return f"{os.path.relpath(self._groups[group][0], self._folder)}:{self._first_rows[group] + row}"

    def row(self, group: int, row: int) -> dict[str, Any]:
        """Returns a row of a row group as Python values.

        Raises:
          BadRow: its file cannot be read at all, or its row group has more than MOST_BYTES.
          DAMAGED: the row group is damaged.
          UnicodeDecodeError: a text is not UTF-8.
        """
        fault = self._faults.get(self._groups[group][0])
        if fault:
            raise BadRow(DAMAGED_FILE, fault)
        table = self._load(group)
        there = set(table.column_names)
        return {name: table.column(name)[row].as_py() if name in there else None for name in self._columns}

    def _load(self, group: int) -> pa.Table:
        path, index = self._groups[group]

        def load() -> pa.Table:
            if group in self._too_large:
                raise BadRow("too-large-row-group", self._too_large[group])
            try:
                table = read_row_group(path, index, self._columns)
            except BadRow as error:
                self._too_large[group] = str(error)
                raise
            if table.num_rows != self.group_rows[group]:
                raise UserError(f"{path} has changed since it was opened; start again, and write new data to new files")
            return table

        with self._lock:
            return self._kept.get((path, index, *self._columns), load)


def expand(patterns: Sequence[str], *, where: str) -> list[str]:
    """Returns the files and folders that paths and globs name, sorted within each glob; the name of a file is no glob.

    Raises:
      UserError: nothing matches, or a file is named twice; `where` opens the message.
    """
    paths = []
    for pattern in patterns:
        if "://" in pattern:
            raise UserError(
                f"{where} names {pattern!r}; data is read from a disk: mount the bucket (gcsfuse), or copy it"
            )
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found or not all(Path(path).exists() for path in found):
            raise UserError(f"{where} names {pattern!r}, which matches no file; give the path or glob of files")
        paths += found
    for path, count in collections.Counter(map(os.path.realpath, paths)).items():
        if count > 1:
            raise UserError(f"{where} names {path!r} {count} times; name it once and raise the source's weight")
    return paths


def read_footers(paths: Sequence[str]) -> list[Footer]:
    """Returns the footer of each file; raises UserError if one is not parquet."""
    footers = footers_or_faults(paths)
    for footer in footers:
        if footer.fault:
            raise UserError(footer.fault)
    return footers


def footers_or_faults(paths: Sequence[str]) -> list[Footer]:
    """Returns the footer of each file, with a fault if it is not parquet; raises UserError if none is."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        footers = list(pool.map(_read_footer, paths))
    if footers and all(footer.fault for footer in footers):
        raise UserError(footers[0].fault)
    return footers


def read_row_group(path: str, group: int, columns: Sequence[str]) -> pa.Table:
    """Reads a row group a few rows at a time, to stop where it takes far more memory than its file.

    Raises:
      BadRow: it has more than MOST_BYTES.
      DAMAGED: it is damaged.
    """
    batches, size = [], 0
    with open_file(path) as file:
        there = [name for name in columns if name in file.schema_arrow.names]
        schema = pa.schema([file.schema_arrow.field(name) for name in there])
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=there):
            batches.append(batch)
            size += batch.nbytes
            if size > MOST_BYTES:
                raise BadRow(
                    "too-large-row-group",
                    f"row group {group} of {path} takes more than {MOST_BYTES} bytes of memory; prepare the file "
                    "(python -m data_pipelines.prepare), which reads it row by row",
                )
    return pa.Table.from_batches(batches, schema)


def reads_as(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Says whether values of a found type can stand for a wanted one: any list or number, a struct with more."""
    types = pa.types
    if types.is_null(found):
        return True
    if types.is_list(wanted):
        listed = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
        return listed and reads_as(found.value_type, wanted.value_type)
    if types.is_struct(wanted):
        fields = {field.name: field.type for field in found} if types.is_struct(found) else {}
        return all(field.name in fields and reads_as(fields[field.name], field.type) for field in wanted)
    if types.is_floating(wanted):
        return types.is_floating(found) or types.is_integer(found)
    if types.is_binary(wanted):
        return types.is_binary(found) or types.is_large_binary(found) or types.is_binary_view(found)
    return types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)


def open_file(path: str) -> pq.ParquetFile:
    """Opens a parquet file whose pages are checked as they are read; raises UserError if it is not one."""
    try:
        return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except (*DAMAGED, UnicodeDecodeError) as error:  # names of columns may be no text
        raise UserError(f"{path} is not a readable parquet file ({error}); write it again") from error


def _read_footer(path: str) -> Footer:
    try:
        with open_file(path) as file:
            groups = tuple(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            if min(groups, default=0) < 0:
                raise UserError(f"{path} is damaged: a row group has {min(groups)} rows; write it again")
            return Footer(path, file.schema_arrow, groups, _footer_digest(path))
    except UserError as error:
        return Footer(path, pa.schema([]), (1,), digest="", fault=str(error))


def _footer_digest(path: str) -> str:
    """Hashes the bytes before the end of the file that its last eight count: their number and the magic word."""
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read(length)).hexdigest()
