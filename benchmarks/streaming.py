"""Whether memory grows with the corpus: the pipeline over 0.2, 2 and 20 GB of small shards.

    python -m benchmarks.streaming [--json FILE]

One shard of photographs (photographs.py), repeated to 32 MiB, is linked under as many names as a corpus of that size
needs: to the pipeline they are so many files, on the disk one. Each corpus is opened and read by a process of its own,
at the released sizes, in eight virtual shards, with prefetching. The columns tell its peak resident memory after the
first batches and after many more, and the seconds it took to open all shards.

Then the largest batch of our recipes, stage 2's, as one of the 64 hosts that its shards are made for reads it, of
photographs of 1 and 3 megapixels. A batch is let go of before the next is asked for, as training does once it is on
the devices.
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
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from benchmarks import pipeline_sides
from benchmarks.pipeline import prepare
from configs.idefics2_8b import stage2
from data_pipelines import manifest, pipeline, records
from data_pipelines.augmentation import Augmentation
from idefics_jax import commands
from idefics_jax.batch import BatchShape
from launch import report

_READ = flags.DEFINE_string("read", None, "a corpus to open and read, as the benchmark asks of its own processes")
_RECIPE = flags.DEFINE_bool("recipe", False, "whether it is read in stage 2's batches")

GIGABYTES = (0.2, 2.0, 20.0)
SHARD_BYTES = 32 * 2**20
VIRTUAL_SHARDS = 8
FIRST, MORE = 4, 20  # batches
RECIPE_MEGAPIXELS, RECIPE_TURNS = (1.0, 3.0), (1, 2)


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


def small_batches(folder: Path) -> pipeline.DataConfig:
    """Returns the settings of the benchmark's own batches, in virtual shards."""
    return dataclasses.replace(
        pipeline_sides.config(folder, workers=2),
        virtual_shards=VIRTUAL_SHARDS,
        shape=dataclasses.replace(pipeline_sides.SHAPE, rows=VIRTUAL_SHARDS),
        lookahead=32,
        lookahead_mib=32,
    )


def recipe_batches(folder: Path) -> pipeline.DataConfig:
    """Returns stage 2's settings for the one shard of a host of 64, over a corpus of photographs."""
    told = stage2.get_config().data.to_dict()
    (photographs,) = pipeline_sides.config(folder, workers=2).stages[0].sources
    augmentation = Augmentation(**told["stages"]["stage2"]["sources"]["pairs"]["augmentation"])
    stage = pipeline.Stage((dataclasses.replace(photographs, augmentation=augmentation),))
    shape = BatchShape(**told["shape"] | {"rows": told["shape"]["rows"] // told["virtual_shards"]})
    return pipeline.DataConfig(**told | {"stages": (stage,), "shape": shape, "virtual_shards": 1, "after": None})


def read(folder: Path, config: pipeline.DataConfig, turns: Sequence[int]) -> None:
    """Opens and reads a corpus, and prints what it took: memory after each of the turns, so many batches each."""
    processor = pipeline_sides.processor_of(folder, resizer="simd")
    began, peaks, images = time.perf_counter(), [], 0
    data = pipeline.batches(config, processor, process_index=0, process_count=1)
    opened = time.perf_counter() - began
    for count in turns:
        for _ in range(count):
            images += int(next(data).arrays["image_mask"].sum())
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    print(json.dumps({"opened": opened, "first": peaks[0], "more": peaks[1], "images": images}), flush=True)
    os._exit(0)  # what is read ahead is of no use


def told_by(folder: Path, *options: str) -> dict[str, float]:
    """Returns what a process of its own prints that reads a folder."""
    command = [sys.executable, "-m", "benchmarks.streaming", f"--read={folder}", *options]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def main() -> None:
    if _READ.value:
        folder, config = Path(_READ.value), recipe_batches if _RECIPE.value else small_batches
        read(folder, config(folder), RECIPE_TURNS if _RECIPE.value else (FIRST, MORE))
    table, numbers = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        shard, told = one_shard(Path(scratch, "one"))
        for gigabytes in GIGABYTES:
            folder = Path(scratch, f"{gigabytes:g}gb")
            shards = corpus(folder, shard, told, gigabytes)
            (folder / "processor").symlink_to(Path(scratch, "one", "processor"))
            took = told_by(folder)
            seen = [took[what] for what in ("opened", "first", "more")]
            table.append([f"{gigabytes:g} GB", shards, shards * shard.records, *seen])
            numbers |= {f"{what}_{gigabytes:g}gb": took[what] for what in ("opened", "first", "more")}
        for megapixels in RECIPE_MEGAPIXELS:
            folder = Path(scratch, f"{megapixels:g}mp")
            prepare(folder, megapixels)
            numbers[f"host_memory_gib_stage2_{megapixels:g}mp"] = told_by(folder, "--recipe")["more"]
    numbers["memory_20gb_over_0.2gb"] = numbers["more_20gb"] / numbers["more_0.2gb"]
    heads = ["corpus", "shards", "documents", "s to open", f"GiB after {FIRST} batches", f"GiB after {MORE} more"]
    report.print_table(heads, table)
    print("\nGiB with stage 2's batches on one of 64 hosts")
    heads = [f"photographs of {megapixels:g} megapixels" for megapixels in RECIPE_MEGAPIXELS]
    report.print_table(heads, [[numbers[f"host_memory_gib_stage2_{size:g}mp"] for size in RECIPE_MEGAPIXELS]])
    report.write_json(numbers)


if __name__ == "__main__":
    commands.run(main)
