"""Run by `make beam` in Beam's own environment; the plain suite passes it by (pyproject.toml)."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import manifest, pairs
from tests.data_pipelines.pictures import png

ROOT = Path(__file__).parents[2]
RUNNERS = {
    "threads": ["--runner", "DirectRunner"],
    "processes": ["--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing"],
}


@pytest.fixture
def inputs(tmp_path) -> list[str]:
    """Three files of pairs, a row of each without a caption."""
    paths = []
    for number in range(3):
        rows = [
            {"key": f"{row}", "png": png(28 + row, 28), "caption": f"{number} {row}" if row else None, "url": "x"}
            for row in range(20)
        ]
        paths.append(str(tmp_path / f"{number}.parquet"))
        pq.write_table(pa.Table.from_pylist(rows, schema=pairs.SCHEMA), paths[-1])
    return paths


def prepare(inputs: list[str], output: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_pipelines.prepare", "--kind", "pairs", "--input", *inputs]
    # A row of twenty has no caption.
    allowed = [] if "--max_bad_fraction" in arguments else ["--max_bad_fraction", "0.05"]
    command += ["--output", str(output), "--shard_mib", "1", *allowed, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    shards = {path.name: path.read_bytes() for path in folder.glob("*.array_record")}
    return shards | {"manifest": (folder / manifest.MANIFEST).read_bytes()}


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
def test_beam_makes_the_bytes_and_the_manifest_of_the_process_pool(tmp_path, inputs, runner):
    pool = prepare(inputs, tmp_path / "pool", "--processes", "2")
    assert pool.returncode == 0, pool.stderr
    piped = prepare(inputs, tmp_path / "beam", *runner)
    assert piped.returncode == 0, piped.stderr
    assert contents(tmp_path / "beam") == contents(tmp_path / "pool")
    assert piped.stdout == pool.stdout.replace(str(tmp_path / "pool"), str(tmp_path / "beam"))
    told = json.loads((tmp_path / "beam" / manifest.MANIFEST).read_bytes())
    assert (told["documents"], told["seen"], told["dropped"]["null-text"]["documents"]) == (57, 60, 3)


def test_either_goes_on_with_what_the_other_left(tmp_path, inputs):
    for first, second in ((["--processes", "1"], RUNNERS["threads"]), (RUNNERS["threads"], ["--processes", "1"])):
        out = tmp_path / f"{first[0]}"
        assert prepare(inputs, out, *first).returncode == 0
        before = contents(out)
        (out / "00001-00000.array_record").unlink()
        kept = (out / "00000-00000.array_record").stat().st_mtime_ns
        assert prepare(inputs, out, *second).returncode == 0
        assert contents(out) == before
        assert (out / "00000-00000.array_record").stat().st_mtime_ns == kept


def test_too_many_bad_rows_end_in_a_sentence(tmp_path, inputs):
    stopped = prepare(inputs, tmp_path / "out", "--max_bad_fraction", "0", *RUNNERS["threads"])
    assert stopped.returncode == 2
    assert "3 of 60 rows are bad (null-text 3, such as 0.parquet:0" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "out" / manifest.MANIFEST).exists()
    assert prepare(inputs, tmp_path / "out", "--max_bad_fraction", "0.1", *RUNNERS["threads"]).returncode == 0


def test_an_input_that_cannot_be_read_ends_in_a_sentence(tmp_path, inputs):
    array = tmp_path / "a.jsonl"
    array.write_text("[]")
    command = [sys.executable, "-m", "data_pipelines.prepare", "--kind", "text", "--input", str(array)]
    command += ["--output", str(tmp_path / "out"), *RUNNERS["threads"]]
    stopped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert stopped.returncode == 2
    assert "is one JSON array" in stopped.stderr
    assert "Traceback" not in stopped.stderr
