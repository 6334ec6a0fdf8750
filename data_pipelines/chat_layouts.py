"""The layouts in which sets of text-only conversations are published, told apart by their columns.

The nine sets of the paper's instruction tuning, with the columns that are read:

    messages: [{role, content}]             what chat templates take, and what this project writes
    conversations: [{from, value}]          OpenHermes-2.5 (ShareGPT's form: human and gpt)
    conversations: [text, ...]              LIMA, the user first
    instruction, input, output, answer      Goat and atlas-math-sets, whose instruction already holds the input
    instruction, input, output              Alpaca's form; MathInstruct, without input
    instruction, context, response          Dolly
    question, answer                        Orca-Math
    query, response                         MetaMathQA
    message_1, message_2                    CAMEL's math

An input or a context follows its instruction on a new line; how the authors joined them is not published.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from data_pipelines.rejection import BadRow

_ROLES = {"human": "user", "gpt": "assistant"}
# The question's column, the one that may follow it, the answer's. The first whose columns are there is the layout.
_QUESTIONS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("question", None, "answer"),
    ("query", None, "response"),
    ("message_1", None, "message_2"),
)


def _texts(*names: str) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])


def _spoken(column: str, speaker: str, text: str) -> pa.Schema:
    return pa.schema([(column, pa.list_(pa.struct([(speaker, pa.string()), (text, pa.string())])))])


MESSAGES = _spoken("messages", "role", "content")
# What a parquet file must have: one of these, the first that fits is read.
NEEDED = (
    MESSAGES,
    _spoken("conversations", "from", "value"),
    pa.schema([("conversations", pa.list_(pa.string()))]),
    _texts("instruction", "input", "output", "answer"),
    _texts("instruction", "input", "output"),
    _texts("instruction", "output"),
    _texts("instruction", "context", "response"),
    _texts("question", "answer"),
    _texts("query", "response"),
    _texts("message_1", "message_2"),
)


def messages(row: Mapping[str, Any]) -> list[dict[str, str | None]]:
    """Returns a row of any layout as messages with `role` and `content`, in order.

    Raises:
      BadRow: its columns are of no layout, or a value is of another type.
    """
    if "messages" in row:
        return [_message(item, "role", "content") for item in _list(row, "messages")]
    if "conversations" in row:
        items = _list(row, "conversations")
        if items and isinstance(items[0], str):
            items = [{"from": ("user", "assistant")[i % 2], "value": item} for i, item in enumerate(items)]
        return [_message(item, "from", "value") for item in items]
    for question, following, answer in _QUESTIONS:
        if question in row and answer in row:
            asked = _text(row, question)
            more = _text(row, following) if following in row and not ("output" in row and "answer" in row) else None
            asked = f"{asked}\n{more}" if asked is not None and more else asked
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(row, answer)}]
    raise BadRow(
        "layout", f"it has {', '.join(sorted(map(str, row))[:9]) or 'nothing'}, which is no layout of a conversation"
    )


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    items = row[column]
    if items is not None and not isinstance(items, list):
        raise BadRow("wrong-type", f"its {column} are {type(items).__name__}; make them a list")
    return items or []


def _message(item: Any, speaker: str, text: str) -> dict[str, str | None]:
    if item is None:
        return {"role": None, "content": None}
    if not isinstance(item, dict):
        raise BadRow("wrong-type", f"a message is {type(item).__name__}; give each its {speaker} and {text}")
    role = _text(item, speaker)
    return {"role": _ROLES.get(role, role), "content": _text(item, text)}


def _text(row: Mapping[str, Any], column: str) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise BadRow("wrong-type", f"its {column} is {type(value).__name__}; make it text")
    return value
