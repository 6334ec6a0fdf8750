"""Web pages in OBELICS' schema: texts and images in reading order, one of the two at each position.

Schema: huggingface.co/datasets/HuggingFaceM4/OBELICS. It stores URLs; here they name files under `image_root`
(image_files.py) and nothing is fetched. In the training form the images' bytes stand where their URLs stood. The
columns `metadata` and `general_metadata` are not read. The loss is on all text. A long page is cut between passages;
an image goes with the passage after it, whose words may tell of it, and one that ends the page with the last.
"""

import functools
import itertools
from typing import Any

import pyarrow as pa

from data_pipelines.image_files import LOST, read_image
from data_pipelines.passages import passages
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
# What a file must have, as published or in the training form: the metadata is not needed.
NEEDED = (
    pa.schema([SCHEMA.field("images"), SCHEMA.field("texts")]),
    pa.schema([("images", pa.list_(pa.binary())), SCHEMA.field("texts")]),
)
# So many images go with a passage; of a longer run the others stand alone, as a row may not hold them all.
_TOGETHER = 2


def parts(row: dict[str, Any], image_root: str | None) -> tuple[Part, ...]:
    """Turns a row into the parts of a document.

    Raises:
      BadRow: the two lists differ in length, a position holds both or neither, or an image file is missing.
    """
    document: list[Part] = []
    for image, text in _positions(row):
        if image is not None:
            document.append(Image(_data(image, image_root)))
        elif document and isinstance(document[-1], Text):
            document.append(Text(f"\n\n{text}", trained=True))  # two texts in a row are two paragraphs
        else:
            document.append(Text(text, trained=True))
    return tuple(document)


def with_images(row: dict[str, Any], image_root: str | None, *, max_missing: float | None) -> dict[str, Any]:
    """Returns the row in the training form, with the images' bytes.

    Args:
      row: as published, or in the training form already.
      image_root: where the images are.
      max_missing: share of the images, in [0, 1], that may be missing: their positions are taken out. None for none.

    Raises:
      BadRow: as `parts`; or more images are missing.
    """
    kept, images = [], 0
    positions = _positions(row)
    for image, text in positions:
        images += image is not None
        try:
            kept.append((image if image is None else _data(image, image_root), text))
        except BadRow as error:
            if max_missing is None or error.reason not in LOST:
                raise
    missing = len(positions) - len(kept)
    if max_missing is not None and missing > max_missing * images:
        raise BadRow(
            "filter:document_max_missing_images", f"{missing} of its {images} images are missing; fetch them again"
        )
    return {**row, "images": [image for image, _ in kept], "texts": [text for _, text in kept]}


def units(row: dict[str, Any]) -> int:
    """Returns the number of passages with their images: where a long page may be cut; raises BadRow as `parts`."""
    _positions(row)
    return len(_cut_into_units(tuple(row["texts"])))


def piece(row: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """Returns the page of units [first, end); a text that goes on in the next is without the white space between."""
    whole = _cut_into_units(tuple(row["texts"]))
    images, texts = [], []
    for position, own in itertools.groupby(itertools.chain(*whole[first:end]), key=lambda part: part[0]):
        images.append(row["images"][position])
        texts.append("".join(passage for _, passage in own) if images[-1] is None else None)
    if end < len(whole) and whole[end][0][0] == position:
        texts[-1] = texts[-1].rstrip()
    return {**row, "images": images, "texts": texts}


def _positions(row: dict[str, Any]) -> list[tuple[str | bytes | None, str | None]]:
    """Returns (image, text) of each position, one of them None; raises BadRow."""
    images, texts = row["images"] or (), row["texts"] or ()
    if len(images) != len(texts):
        raise BadRow(
            "lengths-differ", f"it has {len(images)} images and {len(texts)} texts; pad the shorter with nulls"
        )
    if not images:
        raise BadRow("empty", "it has neither texts nor images; drop the row")
    positions = list(zip(images, texts, strict=True))
    for i, (image, text) in enumerate(positions):
        if (image is None) == (text is None):
            holds = "neither" if image is None else "both"
            raise BadRow("not-one-of-two", f"position {i} holds {holds} an image and a text; it must hold one of them")
    return positions


def _data(image: str | bytes, image_root: str | None) -> bytes:
    return image if isinstance(image, bytes) else read_image(image, image_root)


@functools.lru_cache(maxsize=16)  # the pieces of a page ask for its units again and again
def _cut_into_units(texts: tuple[str | None, ...]) -> list[list[tuple[int, str | None]]]:
    """Returns the units of a page, each of (position, passage), where the passage of an image is None."""
    units: list[list[tuple[int, str | None]]] = []
    images: list[tuple[int, None]] = []
    for position, text in enumerate(texts):
        if text is None:
            images.append((position, None))
            continue
        first, *others = passages(text)
        units += [[image] for image in images[:-_TOGETHER]]
        units.append([*images[-_TOGETHER:], (position, first)])
        units += [[(position, other)] for other in others]
        images = []
    if units:
        units[-1] += images[:_TOGETHER]
        images = images[_TOGETHER:]
    return units + [[image] for image in images]
