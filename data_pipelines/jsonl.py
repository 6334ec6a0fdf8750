"""JSON lines of text-only conversations, plain or gzipped: one object a line, in any layout of chat_layouts.py."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_pipelines import chat_layouts, strict_json
from data_pipelines.rejection import BadRow, Rejected
from idefics_jax.errors import UserError

# Longer lines are passed over unread.
LONGEST_LINE = 64 << 20
_MARK = b"\xef\xbb\xbf"


def read(path: str, kind: str) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """Yields (id, row) for the lines of a file in order, as rows of kind "text"; the id is "file:line" from 1.

    Empty lines are passed over. Of a file that breaks off (a gzip without its end, or a last line that is no JSON and
    has no line feed) the whole lines are given, then one Rejected that names the file.

    Args:
      path: .jsonl, or .jsonl.gz.
      kind: "text".

    Raises:
      UserError: the file cannot be read or is one JSON array, or another kind is asked for.
    """
    if kind != "text":
        raise UserError(f"{path} holds JSON lines, which are read as kind 'text', not {kind!r}; name other files")
    name = Path(path).name
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in _lines(file):
                if number == 1 and line is not None and line.lstrip(_MARK).lstrip().startswith(b"["):
                    raise UserError(f"{path} is one JSON array; write a line for each item (jq -c '.[]' FILE)")
                if line is None or line.strip():
                    row = _row(f"{name}:{number}", line)
                    if isinstance(row, Rejected) and line is not None and _is_torn(line, row.reason):
                        sentence = f"it breaks off in its last line, {number}; download or write it again"
                        yield name, Rejected(name, "broken-jsonl", sentence)
                    else:
                        yield f"{name}:{number}", row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield name, Rejected(name, "broken-gzip", f"it breaks off ({error}); download or write it again")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); name a file of JSON lines") from error


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number, line); None in the place of a line longer than LONGEST_LINE."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) <= LONGEST_LINE:
            yield number, line.removeprefix(_MARK) if number == 1 else line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)
        yield number, None


def _is_torn(line: bytes, reason: str) -> bool:
    """Says whether a line that is no row for this reason is the first part of one, and the file ends there."""
    cut_in_character = reason == "not-utf8" and not line.endswith(b"}")
    return not line.endswith(b"\n") and (reason == "bad-json" or cut_in_character)


def _row(name: str, line: bytes | None) -> dict[str, Any] | Rejected:
    try:
        if line is None:
            raise BadRow("too-large", f"the line is longer than {LONGEST_LINE} bytes; cut it up")
        value = strict_json.parse(line)
        if not isinstance(value, dict):
            raise BadRow("wrong-type", f"the line holds {type(value).__name__}; write an object")
        return {"messages": chat_layouts.messages(value)}
    except BadRow as error:
        return Rejected(name, error.reason, str(error))
