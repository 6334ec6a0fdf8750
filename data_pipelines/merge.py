"""Merges the questions about one image into one conversation: rows of The Cauldron's schema in, the same schema out.

    python -m data_pipelines.merge --input 'vqa/*.parquet' --output vqa-merged

Question sets come with a row for each question. The authors made one conversation of all questions about an image; so
its tokens are paid for once. Images are the same if their bytes are (SHA-256); a row with several images is merged with
rows that have the same ones in the same order. A picture that was encoded twice stays two.

Rows of one image may lie anywhere in the files, so they are first dealt out, by digest, to partitions on disk, each
small enough to be merged in memory: what is held is one partition's images, however large the set is, and the disk must
have room for a second copy of it. Conversations come in the order of their partitions and in them as first seen, turns
in the order of the files, and a turn that comes twice is kept once. Rows without images are conversations already.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import cauldron, parquet
from data_pipelines.rejection import BadRow, Ledger, Rejected
from idefics_jax.errors import UserError

REPORT = "merged.json"
# Partitions are files open at once; a process may commonly have 1024.
_MOST_PARTITIONS = 500
_BATCH_ROWS = 64
_KEY = "key"


@dataclasses.dataclass
class Merged:
    """What was done: rows read, conversations and turns written, and turns left out because they came twice."""

    rows: int = 0
    conversations: int = 0
    turns: int = 0
    repeated_turns: int = 0


def merge(patterns: Sequence[str], out: Path, *, partition_bytes: int, max_bad_fraction: float) -> dict[str, Any]:
    """Writes the merged rows into a new folder, which is never seen half-written.

    Args:
      patterns: parquet files of kind "cauldron", as paths or globs.
      out: a folder that does not exist.
      partition_bytes: about how much is held in memory.
      max_bad_fraction: share of rows that may be dropped, in [0, 1).

    Returns:
      What is written to REPORT: the counts of Merged, "rejected" by reason, and an example of each in "examples".

    Raises:
      UserError: files are missing, damaged or of other columns, OUT exists, or too many rows are bad.
    """
    paths = parquet.expand(patterns, where="--input")
    schema = _schema(paths)
    if out.exists():
        raise UserError(f"--output {out} exists; name a new folder")
    total = sum(Path(path).stat().st_size for path in paths)
    count = min(_MOST_PARTITIONS, -(-total // partition_bytes) or 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        done, ledger = Merged(), Ledger(max_bad_fraction)
        (aside / "new").mkdir()
        partitions = [aside / f"{number:05d}.arrow" for number in range(count)]
        _deal_out(paths, schema, partitions, ledger)
        done.rows = ledger.seen
        for number, partition in enumerate(partitions):
            _merge_partition(partition, schema, aside / "new" / f"merged-{number:05d}.parquet", done)
            partition.unlink()
        report = {**dataclasses.asdict(done), "rejected": dict(ledger.rejected), "examples": ledger.examples}
        (aside / "new" / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        (aside / "new").rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def image_key(row: dict[str, Any]) -> bytes | None:
    """Returns a digest of a row's images, None if it has none.

    Raises:
      BadRow: an image or a turn lacks something; it would spoil the whole conversation.
    """
    if not row["texts"]:
        raise BadRow("no-turns", "it has no turns; a conversation needs a question and an answer")
    if any(turn is None or turn["user"] is None or not turn["assistant"] for turn in row["texts"]):
        raise BadRow("null-text", "a turn lacks its question or its answer; fill it in or drop the turn")
    digests = []
    for image in row["images"] or ():
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise BadRow("null-image", "an image holds neither bytes nor a path; store its bytes")
        named = image["bytes"] is None
        content = image["path"].encode() if named else image["bytes"]
        digests.append(bytes([named]) + hashlib.sha256(content).digest())
    return hashlib.sha256(b"".join(digests)).digest() if digests else None


def _schema(paths: Sequence[str]) -> pa.Schema:
    """Returns the images and turns of the files' columns, which must be the same in all."""
    schemas = []
    for footer in parquet.read_footers(paths):
        if not all(
            field.name in footer.schema.names and parquet.reads_as(footer.schema.field(field.name).type, field.type)
            for field in cauldron.NEEDED[0]
        ):
            raise UserError(f"{footer.path} is not of kind 'cauldron'; it needs {', '.join(cauldron.SCHEMA.names)}")
        schemas.append(pa.schema([footer.schema.field(name) for name in ("images", "texts")]).remove_metadata())
    if any(schema != schemas[0] for schema in schemas):
        raise UserError(f"{paths[0]} and others of --input differ in their columns' types; merge them one by one")
    return schemas[0]


def _deal_out(paths: Sequence[str], schema: pa.Schema, partitions: Sequence[Path], ledger: Ledger) -> None:
    """Writes every row with its key to the partition that its key says; drops and counts bad rows."""
    keyed = pa.schema([(_KEY, pa.binary()), *schema])
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(path), keyed)) for path in partitions]
        for path in paths:
            number = 0
            for batch in _batches(path):
                dealt: dict[int, list[tuple[int, bytes]]] = collections.defaultdict(list)
                for row in range(len(batch)):
                    key = _counted_key(batch, row, f"{path}:{number + row}", ledger)
                    if key is not None:
                        dealt[int.from_bytes(key[:8]) % len(partitions)].append((row, key))
                for partition, rows in dealt.items():
                    columns = batch.take(pa.array([row for row, _ in rows])).columns
                    keys = pa.array([key for _, key in rows], pa.binary())
                    writers[partition].write_batch(pa.RecordBatch.from_arrays([keys, *columns], schema=keyed))
                number += len(batch)


def _batches(path: str) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            yield from file.iter_batches(_BATCH_ROWS, columns=["images", "texts"])
    except parquet.DAMAGED as error:
        raise UserError(f"{path} is damaged ({error}); write it again") from error


def _counted_key(batch: pa.RecordBatch, row: int, name: str, ledger: Ledger) -> bytes | None:
    """Returns the key of a row, its own name's if it has no images, None if it is bad."""
    ledger.seen += 1
    try:
        values = {column: batch.column(column)[row].as_py() for column in ("images", "texts")}
        return image_key(values) or hashlib.sha256(name.encode()).digest()
    except UnicodeDecodeError:
        ledger.reject(Rejected(name, "not-utf8", "a text is not UTF-8; write it again"))
    except BadRow as error:
        ledger.reject(Rejected(name, error.reason, str(error)))
    return None


def _merge_partition(partition: Path, schema: pa.Schema, path: Path, done: Merged) -> None:
    """Writes the conversations of one partition, a row group for each few of them."""
    images: dict[bytes, Any] = {}
    # A dict as an ordered set: turns by what they say.
    texts: dict[bytes, dict[tuple, dict[str, Any]]] = {}
    with pa.ipc.open_stream(str(partition)) as stream:
        for batch in stream:
            keys, shown, said = (batch.column(name) for name in (_KEY, "images", "texts"))
            for row, key in enumerate(keys.to_pylist()):
                if key not in images:
                    images[key], texts[key] = shown[row].as_py(), {}
                for turn in said[row].as_py():
                    done.repeated_turns += (turn["user"], turn["assistant"]) in texts[key]
                    texts[key].setdefault((turn["user"], turn["assistant"]), turn)
    if not images:
        return
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        keys = list(images)
        for first in range(0, len(keys), _BATCH_ROWS):
            rows = [
                {"images": images.pop(key), "texts": list(texts[key].values())}
                for key in keys[first : first + _BATCH_ROWS]
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    done.conversations += len(texts)
    done.turns += sum(map(len, texts.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", action="extend", nargs="+", required=True, help="parquet files, as paths or globs")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--partition_mib", type=int, default=256, help="about how much is held in memory, in MiB")
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="share of rows that may be dropped")
    arguments = parser.parse_args()
    if arguments.partition_mib < 1:
        parser.error(f"--partition_mib is {arguments.partition_mib}; it must be at least 1")
    if not 0 <= arguments.max_bad_fraction < 1:
        parser.error(f"--max_bad_fraction is {arguments.max_bad_fraction}; it must be at least 0 and less than 1")
    try:
        report = merge(
            arguments.input,
            arguments.output,
            partition_bytes=arguments.partition_mib * 2**20,
            max_bad_fraction=arguments.max_bad_fraction,
        )
    except UserError as error:
        parser.error(str(error))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
