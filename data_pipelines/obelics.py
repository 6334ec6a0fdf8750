"""Web pages in OBELICS' schema: texts and images in reading order, one of the two at each position.

Schema: huggingface.co/datasets/HuggingFaceM4/OBELICS. It stores URLs; here they name files under `image_root`
(image_files.py) and nothing is fetched. The loss is on all text.
"""

from typing import Any

import pyarrow as pa

from data_pipelines.image_files import read_image
from data_pipelines.rejection import BadRow
from idefics_jax.documents import Image, Part, Text

SCHEMA = pa.schema(
    [
        ("images", pa.list_(pa.string())),
        ("metadata", pa.string()),
        ("general_metadata", pa.string()),
        ("texts", pa.list_(pa.string())),
    ]
)
# What a file must have: the metadata is not needed.
NEEDED = (pa.schema([SCHEMA.field("images"), SCHEMA.field("texts")]),)


def parts(row: dict[str, Any], image_root: str | None) -> tuple[Part, ...]:
    """Turns a row into the parts of a document.

    Raises:
      BadRow: the two lists differ in length, a position holds both or neither, or an image file is missing.
    """
    images, texts = row["images"] or (), row["texts"] or ()
    if len(images) != len(texts):
        raise BadRow(
            "lengths-differ", f"it has {len(images)} images and {len(texts)} texts; pad the shorter with nulls"
        )
    if not images:
        raise BadRow("empty", "it has neither texts nor images; drop the row")
    document: list[Part] = []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            holds = "neither" if image is None else "both"
            raise BadRow("not-one-of-two", f"position {i} holds {holds} an image and a text; it must hold one of them")
        if image is not None:
            document.append(Image(read_image(image, image_root)))
        elif document and isinstance(document[-1], Text):
            document.append(Text(f"\n\n{text}", trained=True))  # two texts in a row are two paragraphs
        else:
            document.append(Text(text, trained=True))
    return tuple(document)


def units(row: dict[str, Any]) -> int:
    """Returns the number of texts and images: where a long page may be cut."""
    return len(row["texts"])


def piece(row: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """Returns the page of positions [first, end)."""
    return {**row, "images": row["images"][first:end], "texts": row["texts"][first:end]}
