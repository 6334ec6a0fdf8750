"""Stores of downloaded images, as img2dataset writes them, for tests."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_pipelines.tars import as_json, write_tar

SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("sha256", pa.string()),
    ]
)

# What was fetched: (URL, bytes), None where the download failed.
Fetched = list[tuple[str, bytes | None]]


def write_parquet(path: Path, fetched: Fetched, *, schema: pa.Schema | None = None, group: int = 100) -> str:
    """Writes output_format=parquet, and returns the path."""
    schema = schema or SCHEMA.append(pa.field("jpg", pa.binary()))
    table = pa.Table.from_pylist([{**row, "jpg": data} for row, data in _rows(fetched)], schema=schema)
    pq.write_table(table, path, row_group_size=group)
    return str(path)


def write_webdataset(path: Path, fetched: Fetched, *, with_json: bool = True) -> str:
    """Writes output_format=webdataset, the tar and the parquet beside it, and returns the path of the tar."""
    members = []
    for row, data in _rows(fetched):
        if data is not None:
            members.append((f"{row['key']}.jpg", data))
            members += [(f"{row['key']}.json", as_json(row))] if with_json else []
            members.append((f"{row['key']}.txt", b"words"))
    pq.write_table(
        pa.Table.from_pylist([row for row, _ in _rows(fetched)], schema=SCHEMA), path.with_suffix(".parquet")
    )
    return write_tar(path, members)


def _rows(fetched: Fetched) -> list[tuple[dict, bytes | None]]:
    rows = []
    for number, (url, data) in enumerate(fetched):
        failed = data is None
        row = {"url": url, "key": f"{number:09}", "status": "failed_to_download" if failed else "success"}
        rows.append((row | {"sha256": None if failed else hashlib.sha256(data).hexdigest()}, data))
    return rows
