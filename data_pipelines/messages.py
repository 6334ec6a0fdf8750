"""Conversations without images, as chat data sets hold them: `messages: list<struct{role, content}>`, or another layout
of chat_layouts.py.

Roles are user and assistant in turn; a system message is read as the beginning of the first question. Text and loss are
those of The Cauldron's conversations (cauldron.py), and so is where a long one is cut.
"""

from typing import Any

from data_pipelines import cauldron, chat_layouts
from data_pipelines.rejection import BadRow
from idefics_jax.documents import Part

SCHEMA = chat_layouts.MESSAGES
NEEDED = chat_layouts.NEEDED


def parts(row: dict[str, Any], image_root: str | None) -> tuple[Part, ...]:
    """Turns a row into the parts of a document.

    Raises:
      BadRow: the messages are not questions and answers in turn, or one is empty.
    """
    return cauldron.parts({"images": (), "texts": turns(row)}, image_root)


def units(row: dict[str, Any]) -> int:
    """Returns the number of turns: where a long conversation may be cut."""
    return len(turns(row))


def piece(row: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """Returns the conversation of turns [first, end)."""
    return with_turns(row, turns(row)[first:end])


def with_turns(row: dict[str, Any], texts: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a row with other turns."""
    spoken = [{"role": role, "content": turn[role]} for turn in texts for role in ("user", "assistant")]
    return {**row, "messages": spoken}


def turns(row: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the messages as turns of a question and an answer; raises BadRow if they are not that."""
    messages = chat_layouts.messages(row)
    system = ""
    if messages and messages[0]["role"] == "system":
        said = messages.pop(0)["content"]
        system = f"{said}\n" if said else ""
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadRow("roles", f"its roles are {roles[:6]}; user and assistant must take turns, the assistant last")
    texts = [message["content"] for message in messages]
    if texts[0] is not None:
        texts[0] = system + texts[0]
    return [{"user": user, "assistant": answer} for user, answer in zip(texts[::2], texts[1::2], strict=True)]
