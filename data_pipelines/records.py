"""Prepared shards as one long list of rows: ArrayRecord files of msgpack records, reached at random.

A record is `{"id": text, "row": {column: value}}`: the row of a kind with its images as bytes (training_form.py), and
where it came from. Shards are written with one record a group and without compression, so a record is one read of its
own bytes, and ArrayRecord's hashes find every damaged bit. At the start only the indices at the shards' ends are
looked at; memory grows with the number of shards kept open, not with the corpus.
"""

import collections
import concurrent.futures
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module

from data_pipelines.manifest import SUFFIX, Shard, digest_of, fault_of, sha256_of
from data_pipelines.rejection import DAMAGED_FILE, BadRow
from data_pipelines.training_form import Columns, fits

# One record a group: each is found by itself. Images are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"
# No reading ahead: the next record wanted lies elsewhere.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 32768
# Larger than any document that fits a row of training, smaller than what would hurt to hold.
MAX_RECORD_BYTES = 256 * 2**20
# Rows of a shard that shuffling moves together, as it moves a row group of parquet.
GROUP_ROWS = 256
_OPEN_SHARDS = 64


def encode(name: str, row: dict[str, Any]) -> bytes:
    """Returns the record of a row that fits its columns.

    Raises:
      BadRow: a text is not Unicode (a lone surrogate), or the record is too large.
    """
    try:
        record = msgpack.packb({"id": name, "row": row}, use_bin_type=True, strict_types=True)
    except UnicodeEncodeError as error:
        raise BadRow("not-utf8", f"a text cannot be written as UTF-8 ({error.reason}); write it again") from error
    except OverflowError as error:
        raise BadRow("wrong-type", f"a number does not fit 64 bits ({error}); drop its column") from error
    if len(record) > MAX_RECORD_BYTES:
        raise BadRow(
            "too-large-record", f"it takes {len(record)} bytes, more than {MAX_RECORD_BYTES}; cut it into documents"
        )
    return record


def decode(record: bytes, columns: Columns) -> tuple[str, dict[str, Any]]:
    """Returns the id and the row of a record; the row has exactly the columns, with None where one is missing.

    Raises:
      BadRow: the bytes are not one msgpack record of such a row.
    """
    try:
        whole = msgpack.unpackb(record, raw=False, strict_map_key=True, ext_hook=_refuse)
    except ValueError as error:  # of which msgpack's own errors are
        raise BadRow("damaged-record", f"its record is no msgpack ({error}); prepare its shard again") from error
    if (
        not isinstance(whole, dict)
        or not isinstance(whole.get("id"), str)
        or not isinstance(whole.get("row"), dict)
        or not all(fits(whole["row"].get(name), column) for name, column in columns.items())
    ):
        raise BadRow("damaged-record", "its record has another form than its manifest says; prepare its shard again")
    return whole["id"], {name: whole["row"].get(name) for name in columns}


def _refuse(code: int, data: bytes) -> None:
    raise ValueError(f"it has an extension type, {code}")


class RecordRows:
    """The rows of a set of prepared shards, in their order. Threads may share it.

    Attributes:
      shards: the shards.
      group_rows: int64 [groups], the number of rows of each group: up to GROUP_ROWS neighbours of one shard.
      files: how many shards there are.
      faults: what is wrong with each shard that is missing, cut or emptied; its rows are bad, and have their places in
        the order all the same.
      lost: share of the rows that are in those.
    """

    def __init__(self, shards: Sequence[Shard], columns: Columns):
        """Opens every shard once.

        Args:
          shards: with their folders and their numbers of records; none is empty.
          columns: of every row.
        """
        self.shards = shards
        with concurrent.futures.ThreadPoolExecutor() as pool:
            found = pool.map(_fault_of, shards)
            self._faults = {shard.path: fault for shard, fault in zip(shards, found, strict=True) if fault}
        self.files, self.faults = len(shards), tuple(self._faults.values())
        self.lost = sum(it.records for it in shards if it.path in self._faults) / sum(it.records for it in shards)
        self._columns = columns
        folder = os.path.commonpath([os.path.abspath(shard.path.parent) for shard in shards])
        self._names = [os.path.relpath(shard.path, folder) for shard in shards]
        counts = [-(-shard.records // GROUP_ROWS) for shard in shards]
        self._shard_of = np.repeat(np.arange(len(shards)), counts)
        self._first_rows = np.concatenate([[0], *(np.arange(count) * GROUP_ROWS for count in counts)])[1:]
        records = np.array([shard.records for shard in shards], np.int64)
        self.group_rows = np.minimum(GROUP_ROWS, records[self._shard_of] - self._first_rows).astype(np.int64)
        self._readers: collections.OrderedDict[int, array_record_module.ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    @property
    def digest(self) -> str:
        """Of what is in the shards, as their manifests tell it."""
        return digest_of(self.shards)

    def name(self, group: int, row: int) -> str:
        """Returns "shard:record": the shard from the folder that holds all of them."""
        return f"{self._names[self._shard_of[group]]}:{self._first_rows[group] + row}"

    def row(self, group: int, row: int) -> dict[str, Any]:
        """Returns a row of a group.

        Raises:
          BadRow: the record or its shard is damaged, or cannot be read any more.
        """
        shard, record = int(self._shard_of[group]), int(self._first_rows[group] + row)
        path = self.shards[shard].path
        if path in self._faults:
            raise BadRow(DAMAGED_FILE, self._faults[path])
        try:
            (data,) = self._reader(shard).read([record])
        except RuntimeError as error:
            raise BadRow("damaged-record", f"record {record} of {path} cannot be read ({error})") from error
        return decode(data, self._columns)[1]

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        """Returns an open shard. One that falls out of the few kept closes when its last reader lets go of it."""
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
            reader = open_reader(self.shards[shard].path)
            self._readers[shard] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader


def _fault_of(shard: Shard) -> str | None:
    """Opens a shard; returns what is wrong if it is missing, or its size or records are not as its manifest says."""
    fault = fault_of(shard)
    if fault:
        return fault
    count = open_reader(shard.path).num_records()  # 0 where the index at the end cannot be read
    if count == shard.records:
        return None
    return (
        f"{shard.path} opens with {count} records where its manifest says {shard.records}: it is damaged; delete it "
        "and prepare it again (the same command mends only what is missing)"
    )


def open_reader(path: Path) -> array_record_module.ArrayRecordReader:
    """Opens a shard for single reads; what is wrong with it shows when the first record is read, as RuntimeError."""
    return array_record_module.ArrayRecordReader(
        str(path), options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
    )


def write_shards(records: Iterable[bytes], folder: Path, *, prefix: str, shard_bytes: int) -> list[Shard]:
    """Writes records one after another; the same records make the same bytes.

    Args:
      records: from `encode`.
      folder: that takes the shards, PREFIX-00000.array_record and so on.
      prefix: of their names.
      shard_bytes: a shard ends before the record that would make its records more than this.

    Returns:
      The shards, none of them empty; their bytes are on the disk.

    Raises:
      RuntimeError: they cannot be written.
    """
    shards, size, count, writer = [], 0, 0, None

    def finish() -> None:
        writer.close()
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        shards.append(Shard(path, count, path.stat().st_size, sha256_of(path)))

    for record in records:
        if writer is not None and size + len(record) > shard_bytes:
            finish()
            writer = None
        if writer is None:
            path = folder / f"{prefix}-{len(shards):05}{SUFFIX}"
            writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
            size = count = 0
        writer.write(record)
        size, count = size + len(record), count + 1
    if writer is not None:
        finish()
    return shards
