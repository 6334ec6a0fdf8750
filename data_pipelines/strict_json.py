"""JSON and text from files that anyone may have written: what is not valid is refused by reason."""

import json
from typing import Any

from data_pipelines.rejection import BadRow


def text(data: bytes) -> str:
    """Returns UTF-8 text; raises BadRow."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRow("not-utf8", f"a text is not UTF-8 at byte {error.start}; write it again") from None


def parse(data: bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
      BadRow: it is not UTF-8 or not JSON, is nested too deep, or spells half of a surrogate pair, which no UTF-8 holds.
    """
    try:
        value = json.loads(text(data))
    except RecursionError:
        raise BadRow("bad-json", "its JSON is nested too deep; flatten it") from None
    except ValueError as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow("bad-json", f"its JSON cannot be read ({error}); write it again") from None
    if b"\\ud" in data.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRow("not-utf8", "a text holds half of a surrogate pair; write it again") from None
    return value
