"""Preparation again: what is done is left alone, what changed is done again, whatever stopped it before."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines import (
    image_index,
    image_store,
)
from data_pipelines.filters import Filters
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from idefics_jax.errors import UserError
from tests.data_pipelines.pictures import png
from tests.data_pipelines.stores import write_webdataset
from tests.data_pipelines.test_prepare import ROOT, command, contents, here, opened, pair, several, write


def test_a_second_run_changes_nothing(tmp_path):
    inputs, out = several(tmp_path, files=2, rows=5), tmp_path / "out"
    here(opened(inputs, out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert len(before) == 6
    here(opened(inputs, out))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_changed_or_went_is_prepared_again_and_nothing_else(tmp_path):
    inputs, out = several(tmp_path, files=3, rows=5), tmp_path / "out"
    whole = here(opened(inputs, out))
    before = contents(out)
    times = [(out / f"0000{i}-00000.array_record").stat().st_mtime_ns for i in range(3)]
    (out / "00001-00000.array_record").unlink()
    assert here(opened(inputs, out)) == whole
    assert contents(out) == before
    assert [(out / f"0000{i}-00000.array_record").stat().st_mtime_ns for i in (0, 2)] == times[::2]
    write(Path(inputs[2]), [pair("other")])
    assert here(opened(inputs, out))["documents"] == 9
    documents = read_documents(SourceConfig("mine", "pairs", (str(out),)))
    assert [document.parts[-1].text for document in documents][-2:] == ["1 4", "other"]


def test_images_that_come_later_are_taken_by_the_same_command(tmp_path):
    (tmp_path / "images" / "below" / "it").mkdir(parents=True)
    (tmp_path / "images" / "a.png").write_bytes(png(28, 28))
    (tmp_path / "images" / "below" / "back").symlink_to(tmp_path / "images")
    row = {"images": ["a.png", "b.png", "below/it/c.png", None], "texts": [None, None, None, "words"]}
    inputs = [write(tmp_path / "a.parquet", [row], "obelics")]
    chosen = {"kind": "obelics", "filters": Filters(document_max_missing_images=1.0)}

    def images(root: Path) -> int:
        return here(opened(inputs, tmp_path / f"of_{root.name}", image_root=str(root), **chosen))["images"]

    assert images(tmp_path / "images") == 1
    (tmp_path / "images" / "b.png").write_bytes(png(28, 28))
    assert images(tmp_path / "images") == 2
    (tmp_path / "images" / "below" / "it" / "c.png").write_bytes(png(28, 28))
    assert images(tmp_path / "images") == 3
    index = tmp_path / "index"
    for names in (["a.png"], ["a.png", "b.png"]):
        path = write_webdataset(tmp_path / f"{len(names)}.tar", [(name, png(28, 28)) for name in names])
        shutil.rmtree(index, ignore_errors=True)
        image_index.build([path], str(index), sha256="stored", processes=1, keep_cut_short=False)
        image_store.opened.cache_clear()  # another process would open it anew
        assert images(index) == len(names)


def test_shards_beyond_those_of_a_changed_input_go(tmp_path):
    big = [pair("x", png(300, 300) + os.urandom(600_000)) for _ in range(4)]
    path, out = write(tmp_path / "a.parquet", big), tmp_path / "out"
    assert len(here(opened([path], out))["shards"]) == 4
    write(Path(path), big[:1])
    assert len(here(opened([path], out))["shards"]) == 1
    assert len(list(out.glob("*.array_record"))) == 1


def test_an_interrupted_change_leaves_no_manifest_of_other_shards(tmp_path):
    inputs, out = several(tmp_path, files=2, rows=5), tmp_path / "out"
    here(opened(inputs, out))
    write(Path(inputs[0]), [pair("other")])
    with pytest.raises(KeyboardInterrupt), opened(inputs, out).begun():
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="holds no manifest.json"):
        list(read_documents(SourceConfig("mine", "pairs", (str(out),))))
    here(opened(inputs, out))


def test_killed_in_the_middle_of_an_input_and_started_again_it_makes_the_same_bytes(tmp_path):
    """The input is a pipe that gives half of it, so the kill always comes there."""
    lines = [
        "".join(json.dumps({"question": f"{number} {i}?", "answer": "x" * 50}) + "\n" for i in range(2000))
        for number in range(3)
    ]
    inputs = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for path, text in zip(inputs, lines, strict=True):
        path.write_text(text)
    out, names = tmp_path / "out", [str(path) for path in inputs]
    here(opened(names, tmp_path / "unbroken", kind="text", max_pixels=64_000_000))
    inputs[1].unlink()
    os.mkfifo(inputs[1])
    arguments = command("--input", *names, "--output", out, "--processes", 2, "--shard_mib", 1, kind="text")
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)
    with contextlib.suppress(BrokenPipeError), open(inputs[1], "w") as pipe:
        pipe.write(lines[1][: len(lines[1]) // 2])
        pipe.flush()
        wait_until(lambda: len(list((out / "units").glob("*.json"))) == 2)
        assert list((out / ".aside").glob("00001-*"))
        assert process.poll() is None
        process.kill()
        process.wait()
        wait_until(lambda: pipe.write("\n" * 100_000) == 0)  # breaks when the process that reads it has ended too
    inputs[1].unlink()
    inputs[1].write_text(lines[1])
    finished = [(out / f"units/0000{number}.json").stat().st_mtime_ns for number in (0, 2)]
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    assert contents(out) == contents(tmp_path / "unbroken")
    assert [(out / f"units/0000{number}.json").stat().st_mtime_ns for number in (0, 2)] == finished
    assert not (out / ".aside").exists()


@pytest.mark.parametrize("killed", ["preparation.json", "00000.json", "manifest.json"])
def test_killed_while_it_writes_of_itself_it_goes_on_and_leaves_nothing_behind(tmp_path, monkeypatch, killed):
    """What is written aside stays there, under the number of a process that is gone."""
    inputs, out, replace = several(tmp_path, files=1, rows=5), tmp_path / "out", os.replace

    def end(source: Path, target: Path) -> None:
        if target.name == killed:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", end)
        patched.setattr(os, "getpid", lambda: 1)
        with pytest.raises(KeyboardInterrupt):
            here(opened(inputs, out))
    assert len(list(out.rglob(f".{killed}.1"))) == 1
    here(opened(inputs, out))
    assert not list(out.rglob(".*.json.*"))
    here(opened(inputs, tmp_path / "unbroken"))
    assert contents(out) == contents(tmp_path / "unbroken")


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_another_command_in_the_same_folder_is_refused_with_what_differs(tmp_path):
    inputs, out = several(tmp_path, files=3, rows=5), tmp_path / "out"
    here(opened(inputs[:2], out))
    for preparation, message in [
        (opened(inputs[:2], out, shard_mib=2), "shard_mib: 1 -> 2"),
        (opened(inputs[:2], out, filters=Filters(image_min_side=9)), "filters.image_min_side: None -> 9"),
        (opened(inputs[:1], out), r"1 inputs no longer given, such as .*1\.parquet"),
        (opened(inputs, out), r"1 inputs newly given, such as .*2\.parquet"),
        (opened(inputs[1::-1], out), "inputs come in another order"),
    ]:
        with pytest.raises(UserError, match=message):
            here(preparation)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(UserError, match="holds something else"):
        here(opened(inputs, tmp_path / "taken"))


def test_two_at_once_in_a_folder_are_kept_apart(tmp_path):
    inputs, out = several(tmp_path, files=1, rows=5), tmp_path / "out"
    with opened(inputs, out).begun(), pytest.raises(UserError, match="another command is at work in"):
        here(opened(inputs, out))
