"""Whether memory grows with the corpus: the pipeline over 0.2, 2 and 20 GB of small shards.

    python -m benchmarks.streaming [--json FILE]

One shard of photographs (photographs.py), repeated to 32 MiB, is linked under as many names as a corpus of that size
needs: to the pipeline they are so many files, on the disk one. Each corpus is opened and read by a process of its own,
at the released sizes, in eight virtual shards, with prefetching. The columns tell its peak resident memory after the
first batches and after many more, and the seconds it took to open all shards.
"""

import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from benchmarks import pipeline_sides
from benchmarks.pipeline import prepare
from data_pipelines import manifest, pipeline, records
from idefics_jax import commands
from launch import report

_READ = flags.DEFINE_string("read", None, "a corpus to open and read, as the benchmark asks of its own processes")

GIGABYTES = (0.2, 2.0, 20.0)
SHARD_BYTES = 32 * 2**20
VIRTUAL_SHARDS = 8
FIRST, MORE = 4, 20  # batches


def one_shard(folder: Path) -> tuple[manifest.Shard, manifest.Manifest]:
    """Writes a folder of photographs and a shard of SHARD_BYTES with them over and over."""
    size = prepare(folder, 1.0)
    told = manifest.load(folder / "shards")
    rows = records.RecordRows(told.shards, told.columns)
    kept = [rows.row(group, row) for group, count in enumerate(rows.group_rows) for row in range(count)]
    encoded = (records.encode(f"{i}", row) for i, row in enumerate(itertools.islice(itertools.cycle(kept), 10**6)))
    content = itertools.islice(encoded, SHARD_BYTES // size)
    (shard,) = records.write_shards(content, folder, prefix="one", shard_bytes=2 * SHARD_BYTES)
    return shard, told


def corpus(folder: Path, shard: manifest.Shard, told: manifest.Manifest, gigabytes: float) -> int:
    """Links a shard under as many names as make up a size; returns their number."""
    (folder / "shards").mkdir(parents=True)
    count = round(gigabytes * 1e9 / shard.bytes)
    links = [dataclasses.replace(shard, path=folder / "shards" / f"{i:06}{manifest.SUFFIX}") for i in range(count)]
    for link in links:
        os.link(shard.path, link.path)
    content = {
        "format": manifest.FORMAT,
        "kind": told.kind,
        "columns": told.columns,
        "shards": [link.told() for link in links],
        "digest": manifest.digest_of(links),
    }
    manifest.write_json(folder / "shards" / manifest.MANIFEST, content)
    return count


def read(folder: Path) -> None:
    """Opens and reads a corpus, and prints what it took."""
    config = dataclasses.replace(
        pipeline_sides.config(folder, workers=2),
        virtual_shards=VIRTUAL_SHARDS,
        shape=dataclasses.replace(pipeline_sides.SHAPE, rows=VIRTUAL_SHARDS),
        lookahead=32,
        lookahead_mib=32,
    )
    processor = pipeline_sides.processor_of(folder.parent / "one", resizer="simd")
    began, peaks = time.perf_counter(), []
    data = pipeline.batches(config, processor, process_index=0, process_count=1)
    opened = time.perf_counter() - began
    for count in (FIRST, MORE):
        images = sum(int(next(data).arrays["image_mask"].sum()) for _ in range(count))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    print(json.dumps({"opened": opened, "first": peaks[0], "more": peaks[1], "images": images}), flush=True)
    os._exit(0)  # what is read ahead is of no use


def main() -> None:
    if _READ.value:
        read(Path(_READ.value))
    table, numbers = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        shard, told = one_shard(Path(scratch, "one"))
        for gigabytes in GIGABYTES:
            folder = Path(scratch, f"{gigabytes:g}gb")
            shards = corpus(folder, shard, told, gigabytes)
            command = [sys.executable, "-m", "benchmarks.streaming", f"--read={folder}"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            took = json.loads(said.splitlines()[-1])
            seen = [took[what] for what in ("opened", "first", "more")]
            table.append([f"{gigabytes:g} GB", shards, shards * shard.records, *seen])
            numbers |= {f"{what}_{gigabytes:g}gb": took[what] for what in ("opened", "first", "more")}
    numbers["memory_20gb_over_0.2gb"] = numbers["more_20gb"] / numbers["more_0.2gb"]
    heads = ["corpus", "shards", "documents", "s to open", f"GiB after {FIRST} batches", f"GiB after {MORE} more"]
    report.print_table(heads, table)
    report.write_json(numbers)


if __name__ == "__main__":
    commands.run(main)
