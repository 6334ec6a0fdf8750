"""Conversations in The Cauldron's schema: images, then turns of a question and an answer about them.

Schema: huggingface.co/datasets/HuggingFaceM4/the_cauldron. Text and loss as in the instruction tuning of Idefics2:

    User:{images}{question}<end_of_utterance>
    Assistant: {answer}<end_of_utterance>
    User: {question}<end_of_utterance>
    ...

with the loss on the answers and the `<end_of_utterance>` that closes each. A turn may also hold `choices:
list<string>`, one of which is its answer; it is then asked as a multiple-choice question (forms.py).
"""

from typing import Any

import pyarrow as pa

from data_pipelines import forms
from data_pipelines.image_files import read_image
from data_pipelines.rejection import BadRow
from idefics_jax.documents import EndOfUtterance, Image, Part, Text

SCHEMA = pa.schema(
    [
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("texts", pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())]))),
    ]
)
# What a file must have: the name of the original data set is not needed.
NEEDED = (
    pa.schema(
        [
            SCHEMA.field("images"),
            ("texts", pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))),
        ]
    ),
)


def parts(row: dict[str, Any], image_root: str | None) -> tuple[Part, ...]:
    """Turns a row into the parts of a document; `image_root` is where images that hold only a path lie.

    Raises:
      BadRow: an image or a text is missing, there is no turn, or an answer is none of its choices.
    """
    if not row["texts"]:
        raise BadRow("no-turns", "it has no turns; a conversation needs a question and an answer")
    images = tuple(stored_image(image, image_root) for image in row["images"] or ())
    document: list[Part] = [Text("User:" if images else "User: ", trained=False), *images]
    for i, turn in enumerate(row["texts"]):
        if turn is None or turn.get("user") is None or not turn.get("assistant"):
            raise BadRow("null-text", f"turn {i} lacks its question or its answer; fill it in or drop the turn")
        written = forms.written_out(turn)
        document += [
            Text(written["user"] if i == 0 else f"\nUser: {written['user']}", trained=False),
            EndOfUtterance(trained=False),
            Text("\nAssistant:", trained=False),
            Text(f" {written['assistant']}", trained=True),
            EndOfUtterance(trained=True),
        ]
    return tuple(document)


def turns(row: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Returns the turns of a conversation."""
    return list(row["texts"] or ())


def with_turns(row: dict[str, Any], texts: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Returns a row with other turns."""
    return {**row, "texts": texts}


def units(row: dict[str, Any]) -> int:
    """Returns the number of turns: where a long conversation may be cut."""
    return len(row["texts"] or ())


def piece(row: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """Returns the conversation of turns [first, end), with all images."""
    return {**row, "texts": row["texts"][first:end]}


def stored_image(image: dict[str, Any] | None, image_root: str | None) -> Image:
    """Returns an image that a row holds as bytes or as a path; raises BadRow."""
    if image is not None and image.get("bytes") is not None:
        return Image(image["bytes"])
    if image is None or image.get("path") is None:
        raise BadRow("null-image", "an image holds neither bytes nor a path; store its bytes")
    return Image(read_image(image["path"], image_root))
