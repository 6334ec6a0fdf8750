"""JSON lines: every published layout gives the same conversation, and a bad line is counted by its number."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import chat_layouts, jsonl, messages
from data_pipelines.rejection import BadRow, Rejected
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from idefics_jax.errors import UserError

TWO = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
# Rows as the sets publish them, with columns that are not read.
PUBLISHED = {
    "messages": {"messages": TWO, "id": "7"},
    "openhermes": {
        "conversations": [{"from": "human", "value": "1+1?", "weight": None}, {"from": "gpt", "value": "2"}],
        "source": "x",
    },
    "lima": {"conversations": ["1+1?", "2"], "source": "stackexchange"},
    "goat": {"instruction": "1+1?", "input": "1 + 1", "output": "2", "answer": "two"},
    "alpaca": {"instruction": "1+1?", "input": "", "output": "2"},
    "math_instruct": {"source": "data/CoT/x.json", "output": "2", "instruction": "1+1?"},
    "dolly": {"instruction": "1+1?", "context": "", "response": "2", "category": "open_qa"},
    "orca_math": {"question": "1+1?", "answer": "2"},
    "metamathqa": {"type": "GSM_Rephrased", "query": "1+1?", "original_question": "How much?", "response": "2"},
    "camel_ai_math": {"role_1": "Maths_X", "topic;": "Sums", "sub_topic": "s", "message_1": "1+1?", "message_2": "2"},
}


def lines(path, *values):
    path.write_bytes(b"".join(v if isinstance(v, bytes) else json.dumps(v).encode() + b"\n" for v in values))
    return str(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_layout_is_read_from_json_lines_and_from_parquet(tmp_path, name):
    path = lines(tmp_path / "a.jsonl", PUBLISHED[name])
    assert list(jsonl.read(path, "text")) == [("a.jsonl:1", {"messages": TWO})]
    pq.write_table(pa.Table.from_pylist([PUBLISHED[name]]), tmp_path / "a.parquet")
    (document,) = read_documents(SourceConfig("mine", "text", (str(tmp_path / "a.parquet"),)))
    assert document.parts == messages.parts({"messages": TWO}, None)


def test_inputs_and_contexts_follow_on_a_new_line():
    for row in (
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
        {"instruction": "Add.", "context": "1 and 1", "response": "2"},
    ):
        assert chat_layouts.messages(row)[0] == {"role": "user", "content": "Add.\n1 and 1"}


def test_longer_conversations_keep_their_order_and_their_system_message():
    values = ["be brief", "q1", "a1", "q2", "a2"]
    speakers = ["system", "human", "gpt", "human", "gpt"]
    row = {"conversations": [{"from": s, "value": v} for s, v in zip(speakers, values, strict=True)]}
    found = chat_layouts.messages(row)
    assert [message["content"] for message in found] == values
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user", "assistant"]
    assert chat_layouts.messages({"conversations": values[1:]}) == found[1:]


BAD = [
    (b"{\n", "bad-json"),
    (b'{"a": "\xff"}\n', "not-utf8"),
    (b'{"question": "\\udfff", "answer": "a"}\n', "not-utf8"),
    (b"3\n", "wrong-type"),
    (b"[1]\n", "wrong-type"),
    ({"text": "no layout"}, "layout"),
    ({}, "layout"),
    ({"messages": "text"}, "wrong-type"),
    ({"messages": ["text"]}, "wrong-type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "wrong-type"),
    ({"messages": [{"role": 1, "content": "q"}]}, "wrong-type"),
    ({"conversations": ["q", 1]}, "wrong-type"),
    ({"question": 1, "answer": "a"}, "wrong-type"),
    (b"[" * 100_000 + b"\n", "bad-json"),
]


def test_bad_lines_are_counted_by_reason_and_number_and_good_ones_stay(tmp_path):
    contents = [value for bad, _ in BAD for value in (PUBLISHED["lima"], bad)]
    found = list(jsonl.read(lines(tmp_path / "a.jsonl", *contents), "text"))
    assert [name for name, _ in found] == [f"a.jsonl:{i + 1}" for i in range(2 * len(BAD))]
    assert [row for _, row in found[::2]] == [{"messages": TWO}] * len(BAD)
    assert [(row.name, row.reason) for _, row in found[1::2]] == [
        (f"a.jsonl:{2 * i + 2}", reason) for i, (_, reason) in enumerate(BAD)
    ]


def test_empty_lines_marks_and_a_last_line_without_its_end_do_no_harm(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(PUBLISHED["lima"]).encode() + b'\r\n\n \n{"question":"1+1?","answer":"2"}'
    )
    assert list(jsonl.read(str(path), "text")) == [("a.jsonl:1", {"messages": TWO}), ("a.jsonl:4", {"messages": TWO})]
    path.write_bytes(b"")
    assert list(jsonl.read(str(path), "text")) == []


def test_a_line_too_long_is_passed_over_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 100)
    path = lines(tmp_path / "a.jsonl", PUBLISHED["lima"], b"x" * 1000 + b"\n", PUBLISHED["lima"], b"y" * 101)
    found = list(jsonl.read(path, "text"))
    assert [getattr(row, "reason", None) for _, row in found] == [None, "too-large", None, "too-large"]


def test_a_gzip_that_breaks_off_gives_its_whole_lines_and_then_says_so(tmp_path):
    data = gzip.compress(
        b"".join(json.dumps({"question": f"{i} {i**9}", "answer": "a"}).encode() + b"\n" for i in range(999))
    )
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data)
    whole = list(jsonl.read(str(path), "text"))
    assert len(whole) == 999
    path.write_bytes(data[: len(data) // 2])
    *rows, (name, last) = jsonl.read(str(path), "text")
    assert 0 < len(rows) < 999
    assert rows == whole[: len(rows)]
    assert (name, last.reason) == ("a.jsonl.gz", "broken-gzip")
    for damaged in (b"", b"no gzip", data[:30] + bytes(99) + data[129:]):
        path.write_bytes(damaged)
        assert all(isinstance(row, Rejected | dict) for _, row in jsonl.read(str(path), "text"))


def test_lines_that_break_off_are_given_up_to_the_last_and_then_that_is_said(tmp_path):
    line = json.dumps({"question": "wieviel?", "answer": "fünf"}, ensure_ascii=False).encode() + b"\n"
    for cut in range(1, len(line) - 1):
        *rows, (name, last) = jsonl.read(lines(tmp_path / "a.jsonl", line * 2 + line[:cut]), "text")
        assert [name for name, _ in rows] == ["a.jsonl:1", "a.jsonl:2"]
        assert (name, last.reason) == ("a.jsonl", "broken-jsonl")
    assert len(list(jsonl.read(lines(tmp_path / "a.jsonl", line + line[:-1]), "text"))) == 2
    (name, bad) = list(jsonl.read(lines(tmp_path / "a.jsonl", line, BAD[2][0].rstrip()), "text"))[-1]
    assert (name, bad.reason) == ("a.jsonl:2", "not-utf8")


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(UserError, match=r"one JSON array; write a line for each item \(jq"):
        list(jsonl.read(lines(tmp_path / "a.jsonl", b' [\n{"question"'), "text"))
    with pytest.raises(UserError, match="kind 'text', not 'pairs'"):
        next(jsonl.read(lines(tmp_path / "a.jsonl"), "pairs"))
    with pytest.raises(UserError, match="cannot be read"):
        next(jsonl.read(str(tmp_path / "missing.jsonl"), "text"))


def test_roles_are_judged_by_the_kind():
    with pytest.raises(BadRow, match="must take turns"):
        messages.parts({"messages": chat_layouts.messages({"conversations": ["only a question"]})}, None)
