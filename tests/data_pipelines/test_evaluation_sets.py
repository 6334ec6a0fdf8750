"""Evaluation sets are TFDS sets: written and read without TensorFlow, and the same questions as their parquet's."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import cauldron, evaluation_sets
from data_pipelines.evaluation_sets import EvaluationConfig
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from idefics_jax.errors import UserError
from tests.data_pipelines.conftest import COUNTS
from tests.data_pipelines.pictures import png

STORED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def build(folder, parquet, **settings) -> Path:
    config = EvaluationConfig(name="mine", paths=(str(parquet),), **settings)
    return evaluation_sets.build(folder / "sets", config)


def examples(folder, split="test") -> list[dict]:
    import tensorflow_datasets as tfds

    return list(tfds.builder_from_directory(str(folder)).as_data_source(split))


def test_the_embedded_questions_are_those_of_their_parquet(digits_folder, tmp_path):
    folder = build(tmp_path, digits_folder / "heldout.parquet")
    from_parquet = read_documents(SourceConfig("x", "cauldron", (str(digits_folder / "heldout.parquet"),)))
    from_tfds = read_documents(SourceConfig("x", "cauldron", (f"{folder}/*-test.array_record-*",)))
    wanted = [document.parts for document in from_parquet]
    assert [document.parts for document in from_tfds] == wanted
    assert len(wanted) == COUNTS["heldout"]
    assert [example["id"] for example in examples(folder)[:2]] == [b"heldout.parquet:0", b"heldout.parquet:1"]


def test_each_turn_is_a_question(tmp_path):
    turns = [{"user": f"q{i}", "assistant": f"a{i}", "source": "s"} for i in range(2)]
    row = {"images": [{"bytes": png(9, 9), "path": None}], "texts": turns}
    pq.write_table(pa.Table.from_pylist([row], schema=cauldron.SCHEMA), tmp_path / "a.parquet")
    found = examples(build(tmp_path, tmp_path / "a.parquet", split="validation"), "validation")
    assert [(example["id"], example["question"], list(example["answers"])) for example in found] == [
        (b"a.parquet:0#0", b"q0", [b"a0"]),
        (b"a.parquet:0#1", b"q1", [b"a1"]),
    ]
    assert [list(example["images"]) for example in found] == [[png(9, 9)]] * 2


def test_questions_may_have_several_answers_an_id_and_their_image_in_a_file(tmp_path):
    (tmp_path / "i.png").write_bytes(png(9, 9))
    rows = [{"question_id": 7, "image": {"bytes": None, "path": "i.png"}, "question": "q", "answers": ["a", "b"]}]
    table = pa.Table.from_pylist(rows).set_column(1, "image", pa.array([rows[0]["image"]], STORED))
    pq.write_table(table, tmp_path / "a.parquet")
    (example,) = examples(build(tmp_path, tmp_path / "a.parquet", image_root=str(tmp_path)))
    assert example["id"] == b"7"
    assert list(example["images"]) == [png(9, 9)]
    assert list(example["answers"]) == [b"a", b"b"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": None}, "row 0 of .*a question or an answer is missing"),
        ({"question": "q", "answers": []}, "a question or an answer is missing"),
        ({"caption": "c"}, "a question or an answer is missing"),
        ({"question": "q", "answer": "a", "image": {"bytes": None, "path": None}}, "neither bytes nor a path"),
    ],
)
def test_rows_that_hold_no_question_are_named(tmp_path, row, message):
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        build(tmp_path, tmp_path / "a.parquet")


def test_the_command_writes_a_set_once_and_no_tensorflow_is_imported(digits_folder, tmp_path):
    code = (
        "import runpy, sys; runpy.run_module('data_pipelines.evaluation_sets', run_name='__main__'); "
        "import glob, data_pipelines.sources as s; "
        "c = s.SourceConfig('x', 'cauldron', (sys.argv[1] + '/evaluation_set/digits/1.0.0/*.array_record-*',)); "
        "print(len(list(s.read_documents(c)))); assert 'tensorflow' not in sys.modules"
    )
    parquet = str(digits_folder / "heldout.parquet")
    command = [sys.executable, "-c", code, str(tmp_path), "--name", "digits", "--input", parquet]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == [str(tmp_path / "evaluation_set/digits/1.0.0"), str(COUNTS["heldout"])]
    again = EvaluationConfig(name="digits", paths=(parquet,))
    with pytest.raises(UserError, match="is there already; delete it"):
        evaluation_sets.build(tmp_path, again)
