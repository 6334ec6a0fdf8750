"""Questions about one image become one conversation, wherever they lie, and nothing else changes."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import cauldron
from data_pipelines.merge import REPORT, merge
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from idefics_jax.errors import UserError
from tests.data_pipelines.pictures import png


def row(picture: int | None, *questions: str, answer: str | None = "yes") -> dict:
    images = [] if picture is None else [{"bytes": png(20 + picture, 20), "path": f"{picture}.png"}]
    return {"images": images, "texts": [{"user": q, "assistant": answer, "source": "s"} for q in questions]}


def write(folder, *files: list[dict], schema: pa.Schema = cauldron.SCHEMA) -> list[str]:
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate(files):
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{number}.parquet", row_group_size=3)
    return [str(folder / "*.parquet")]


def conversations(folder) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def merged(tmp_path, *files, partition_bytes=2**20, max_bad_fraction=0.0, schema=cauldron.SCHEMA) -> dict:
    inputs = write(tmp_path / "in", *files, schema=schema)
    return merge(inputs, tmp_path / "out", partition_bytes=partition_bytes, max_bad_fraction=max_bad_fraction)


@pytest.mark.parametrize("partition_bytes", [2**30, 2000])
def test_every_question_stays_with_its_image_whatever_the_partitions(tmp_path, partition_bytes):
    rows = [row(i % 7, f"question {i}") for i in range(70)]
    report = merged(tmp_path, rows[:40], rows[40:], partition_bytes=partition_bytes)
    found = conversations(tmp_path / "out")
    assert {
        (conversation["images"][0]["path"], tuple(turn["user"] for turn in conversation["texts"]))
        for conversation in found
    } == {(f"{k}.png", tuple(f"question {i}" for i in range(k, 70, 7))) for k in range(7)}
    assert [one["images"] for one in found if one["images"][0]["path"] == "3.png"] == [rows[3]["images"]]
    assert report == json.loads((tmp_path / "out" / REPORT).read_text())
    assert (report["rows"], report["conversations"], report["turns"]) == (70, 7, 70)
    assert (len(list((tmp_path / "out").glob("*.parquet"))) > 1) == (partition_bytes == 2000)
    assert [path.name for path in tmp_path.iterdir()] in (["in", "out"], ["out", "in"])


def test_images_are_compared_by_their_bytes_and_order(tmp_path):
    a, b = png(20, 20), png(21, 20)

    def shown(*images):
        return {
            "images": [{"bytes": data, "path": str(i)} for i, data in enumerate(images)],
            "texts": [{"user": "?", "assistant": "!", "source": "s"}],
        }

    named = {"images": [{"bytes": None, "path": "a.png"}], "texts": row(None, "q")["texts"]}
    report = merged(tmp_path, [shown(a), shown(a, b), shown(b, a), shown(b), shown(a), named, named])
    assert report["conversations"] == 5
    assert report["repeated_turns"] == 2


def test_conversations_without_images_are_left_alone(tmp_path):
    report = merged(tmp_path, [row(None, "a", "b"), row(None, "a"), row(None, "a")])
    assert sorted(len(one["texts"]) for one in conversations(tmp_path / "out")) == [1, 1, 2]
    assert report["conversations"] == 3


def test_a_bad_row_does_not_spoil_its_image(tmp_path):
    rows = [
        row(0, "a"),
        row(0, "b", answer=None),
        row(0),
        row(0, "c"),
        {"images": [None], "texts": row(0, "d")["texts"]},
    ]
    report = merged(tmp_path, rows, max_bad_fraction=0.9)
    (one,) = conversations(tmp_path / "out")
    assert [turn["user"] for turn in one["texts"]] == ["a", "c"]
    assert report["rejected"] == {"null-text": 1, "no-turns": 1, "null-image": 1}
    assert {reason: name.split(":")[-1] for reason, name in report["examples"].items()} == {
        "null-text": "1",
        "no-turns": "2",
        "null-image": "4",
    }
    with pytest.raises(UserError, match=r"1 of 2 documents were rejected \(null-text 1\)"):
        merge([str(tmp_path / "in" / "*.parquet")], tmp_path / "other", partition_bytes=2**20, max_bad_fraction=0.0)
    assert not (tmp_path / "other").exists()


def test_text_that_is_not_utf8_is_counted(tmp_path):
    (tmp_path / "in").mkdir()
    said = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    turns = pa.StructArray.from_arrays([said, said, said], ["user", "assistant", "source"])
    texts = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), turns)
    images = pa.array([[], []], cauldron.SCHEMA.field("images").type)
    pq.write_table(pa.Table.from_arrays([images, texts], ["images", "texts"]), tmp_path / "in" / "0.parquet")
    report = merge([str(tmp_path / "in/0.parquet")], tmp_path / "out", partition_bytes=2**20, max_bad_fraction=0.9)
    assert report["rejected"] == {"not-utf8": 1}
    assert report["conversations"] == 1


def test_choices_come_along_and_the_result_is_a_source(tmp_path):
    turn = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("choices", pa.list_(pa.string()))])
    schema = pa.schema([cauldron.SCHEMA.field("images"), ("texts", pa.list_(turn))])
    rows = [row(0, "which?"), row(0, "what?")]
    rows[0]["texts"][0]["choices"] = ["no", "yes"]
    merged(tmp_path, rows, schema=schema)
    (document,) = read_documents(SourceConfig("mine", "cauldron", (str(tmp_path / "out" / "*.parquet"),)))
    text = "".join(getattr(part, "text", "") for part in document.parts)
    assert "Choices:\nA. no\nB. yes\nAnswer with the letter." in text
    assert text.endswith("\nUser: what?\nAssistant: yes")


def test_what_cannot_be_merged_is_refused(tmp_path):
    inputs = write(tmp_path / "in", [row(0, "a")])
    with pytest.raises(UserError, match="exists; name a new folder"):
        merge(inputs, tmp_path, partition_bytes=2**20, max_bad_fraction=0.0)
    pq.write_table(pa.table({"images": [1]}), tmp_path / "in" / "1.parquet")
    with pytest.raises(UserError, match=r"1\.parquet is not of kind 'cauldron'"):
        merge(inputs, tmp_path / "out", partition_bytes=2**20, max_bad_fraction=0.0)
