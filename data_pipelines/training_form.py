"""The training form: what a row of each kind looks like in a prepared shard.

It is the kind's own row with images as bytes where the published form may name a file or a URL, so that training
reads a shard with the same kind module as parquet, and needs nothing beside it. A perplexity is kept, to filter by
again, and of pairs every text, to choose captions from; other columns and fields that were published are left behind.
"""

from collections.abc import Mapping
from typing import Any

from data_pipelines import chat_layouts, obelics, pairs
from data_pipelines.cauldron import stored_image
from data_pipelines.filters import PERPLEXITY
from data_pipelines.rejection import BadRow

# A column's form: "bytes", "text" or "number"; a list of one form; or a group of named forms. Any value may be null.
Column = str | list | dict
Columns = Mapping[str, Column]

_STORED_IMAGES = [{"bytes": "bytes", "path": "text"}]
# Kind -> the columns its rows always have.
COLUMNS: dict[str, Columns] = {
    "cauldron": {
        "images": _STORED_IMAGES,
        "texts": [{"user": "text", "assistant": "text", "source": "text", "choices": ["text"]}],
    },
    "obelics": {"images": ["bytes"], "texts": ["text"]},
    "pairs": {"image": "bytes", "caption": "text"},
    "pdf": {"images": _STORED_IMAGES, "texts": ["text"]},
    "text": {"messages": [{"role": "text", "content": "text"}]},
}
_TYPES = {"bytes": bytes, "text": str, "number": (int, float)}


def training_row(
    kind: str, row: Mapping[str, Any], image_root: str | None, *, max_missing: float | None
) -> dict[str, Any]:
    """Returns a row of a kind in the training form.

    Args:
      kind: a name in COLUMNS.
      row: as the kind's published files hold it.
      image_root: where images that the row only names are found (image_files.py); None if it holds them all.
      max_missing: share of a page's images that may be missing; None for none (obelics.with_images).

    Raises:
      BadRow: an image is missing, or a value is of another type than the kind's.
    """
    whole = _whole(kind, row, image_root, max_missing)
    stored = {name: whole.get(name) for name in COLUMNS[kind]}
    for name, column in COLUMNS[kind].items():
        if not fits(stored[name], column):
            raise BadRow("wrong-type", f"its {name} are not {column}; convert them")
        stored[name] = _without_others(stored[name], column)
    if kind == "pairs":
        stored |= {name: value for name, value in whole.items() if name not in stored and isinstance(value, str)}
    if isinstance(whole.get(PERPLEXITY), (int, float)):
        stored[PERPLEXITY] = whole[PERPLEXITY]
    return stored


def _whole(kind: str, row: Mapping[str, Any], image_root: str | None, max_missing: float | None) -> Mapping[str, Any]:
    """Returns a row with its images as bytes."""
    if kind == "text":
        return {"messages": chat_layouts.messages(row)}
    if kind in ("obelics", "pairs"):
        return {"obelics": obelics, "pairs": pairs}[kind].with_images(row, image_root, max_missing=max_missing)
    images = row.get("images")
    if images is None or not fits(images, _STORED_IMAGES):
        return row
    return {**row, "images": [{"bytes": stored_image(image, image_root).data, "path": None} for image in images]}


def fits(value: Any, column: Column) -> bool:
    """Says whether a value is null or of a column's form; a group may lack members and have others."""
    if value is None:
        return True
    if isinstance(column, list):
        return isinstance(value, list) and all(fits(item, column[0]) for item in value)
    if isinstance(column, dict):
        return isinstance(value, dict) and all(fits(value.get(name), form) for name, form in column.items())
    return isinstance(value, _TYPES[column])


def _without_others(value: Any, column: Column) -> Any:
    """Returns a value that fits a column's form without the members of groups that the form does not name."""
    if isinstance(value, list):
        return [_without_others(item, column[0]) for item in value]
    if isinstance(value, dict):
        return {name: _without_others(value[name], form) for name, form in column.items() if name in value}
    return value


def columns_of(kind: str, row: Mapping[str, Any]) -> Columns:
    """Returns the columns of a row in the training form."""
    extras = {name: "text" if isinstance(row[name], str) else "number" for name in sorted(row.keys() - COLUMNS[kind])}
    return {**COLUMNS[kind], **extras}


def images_in(kind: str, row: Mapping[str, Any]) -> int:
    """Returns the number of images of a row in the training form."""
    if kind == "pairs":
        return int(row["image"] is not None)
    return sum(image is not None for image in row.get("images") or ())
