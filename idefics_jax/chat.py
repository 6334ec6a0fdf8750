"""Conversations as document parts: the released chat template, rendered without a flat string.

    User:<image>What is this?<end_of_utterance>
    Assistant: A cat.<end_of_utterance>
    User: What colour?<end_of_utterance>
    Assistant:

`CHAT_TEMPLATE` is the same rule in Jinja, for transformers; `chat_parts` is what this port follows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from idefics_jax.documents import EndOfUtterance, Image, Part, Text
from idefics_jax.errors import UserError

CHAT_TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def chat_parts(
    messages: Sequence[Mapping[str, Any]], images: Sequence[bytes], *, add_generation_prompt: bool
) -> tuple[Part, ...]:
    """Renders a conversation.

    Args:
      messages: Hugging Face's form, `{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": …}]}`.
      images: the encoded images, in the order of the messages' image entries.
      add_generation_prompt: whether to end with the words that ask the assistant to speak.

    Returns:
      The parts. What the assistant says is trained, down to the `<end_of_utterance>` that closes it; roles, line
      breaks and everybody else's words are not.

    Raises:
      UserError: a message of another form, or not as many images as image entries.
    """
    parts: list[Part] = []
    waiting = iter(images)
    wanted = 0
    for number, message in enumerate(messages):
        role, content = _checked(message, number)
        speaks = role == "assistant"
        parts.append(Text(f"{role.capitalize()}:", trained=False))
        if content[0]["type"] == "text":
            parts.append(Text(" ", trained=speaks))  # part of the answer: its first token begins with this space
        for entry in content:
            if entry["type"] == "text":
                parts.append(Text(entry["text"], trained=speaks))
            else:
                wanted += 1
                parts.append(Image(next(waiting, b"")))
        parts += [EndOfUtterance(trained=speaks), Text("\n", trained=False)]
    if wanted != len(images):
        raise UserError(f"the messages hold {wanted} image entries and {len(images)} images were given; give one each")
    if add_generation_prompt:
        parts.append(Text("Assistant:", trained=False))
    return tuple(parts)


def _checked(message: Mapping[str, Any], number: int) -> tuple[str, Sequence[Mapping[str, Any]]]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UserError(f"messages[{number}].role is {role!r}; it must be 'user' or 'assistant'")
    if isinstance(content, str) or not isinstance(content, Sequence) or not content:
        raise UserError(f"messages[{number}].content is {content!r}; it must be a list of text and image entries")
    for entry in content:
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if kind not in ("text", "image") or (kind == "text" and not isinstance(entry.get("text"), str)):
            raise UserError(
                f"messages[{number}].content holds {entry!r}; "
                'an entry is {"type": "text", "text": "…"} or {"type": "image"}'
            )
    return role, content
