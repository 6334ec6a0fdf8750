"""Image-text pairs as img2dataset writes them: an image under its format's name, and a caption.

Schema: github.com/rom1504/img2dataset with output_format=parquet; the image column is called jpg, png or webp after
encode_format, the caption column `caption`, and columns it was told to save keep their names (LAION-COCO's synthetic
captions beside the alt-text, for one). A URL that it could not fetch is a row too, without an image and with a status
that says so: it is no damage, and has a name of its own in the counts. In the training form, and as read from its tars,
the column is called `image`. The loss is on the caption.
"""

from typing import Any

import pyarrow as pa

from data_pipelines.rejection import FILTERED, BadRow
from idefics_jax.documents import Image, Part, Text

# What this project writes; img2dataset adds columns on the download.
SCHEMA = pa.schema([("key", pa.string()), ("png", pa.binary()), ("caption", pa.string()), ("url", pa.string())])
IMAGE_COLUMNS = ("image", "jpg", "png", "webp")
# How its download ended; a file may not tell.
STATUS = pa.field("status", pa.string())
_NEEDED = tuple(pa.schema([(image, pa.binary()), ("caption", pa.string())]) for image in IMAGE_COLUMNS)
# What a file must have: one of these, the first that fits is read.
NEEDED = (*(needed.append(STATUS) for needed in _NEEDED), *_NEEDED)
NOT_DOWNLOADED = f"{FILTERED}not_downloaded"


def parts(row: dict[str, Any], image_root: str | None) -> tuple[Part, ...]:
    """Turns a row into the parts of a document: the image, then its caption.

    Raises:
      BadRow: the image or the caption is missing.
    """
    del image_root  # a pair holds its image
    image, caption = Image(_data(row)), row["caption"]
    if not caption:
        raise BadRow("null-text", "it holds no caption; name other columns in captions, or drop the row")
    return image, Text(caption, trained=True)


def with_images(row: dict[str, Any], image_root: str | None, *, max_missing: float | None) -> dict[str, Any]:
    """Returns the row in the training form, the image under `image`; raises BadRow if there is none."""
    del image_root, max_missing  # a pair holds its image, and is nothing without it
    return {"image": _data(row), **{name: value for name, value in row.items() if name not in IMAGE_COLUMNS}}


def with_caption(row: dict[str, Any], captions: tuple[tuple[str, float], ...], draw: float) -> dict[str, Any]:
    """Returns the row with one of several texts as its caption.

    Args:
      row: with the columns that `captions` names, or without those that are null in it.
      captions: (column, share of the rows) each; the shares are relative to their sum.
      draw: a number in [0, 1) that decides. A row whose text of that column is null or empty takes the next column's
        that is not, in the order of `captions` and round again: a pair is kept while it has any text.
    """
    if not captions:
        return row
    names, shares = zip(*captions, strict=True)
    chosen, reached = 0, shares[0]
    while reached <= draw * sum(shares) and chosen < len(names) - 1:
        chosen += 1
        reached += shares[chosen]
    texts = (row.get(name) for name in names[chosen:] + names[:chosen])
    return {**row, "caption": next(filter(None, texts), None)}


def units(row: dict[str, Any]) -> int:
    """Returns 1: a pair is not cut."""
    del row
    return 1


def _data(row: dict[str, Any]) -> bytes:
    data = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), None)
    if data is None and row.get("status") not in (None, "success"):
        raise BadRow(NOT_DOWNLOADED, f"its status is {row['status']!r}; fetch it again or drop the row")
    if data is None:
        raise BadRow("null-image", "it holds no image; drop the row")
    return data
