"""Image-text pairs as img2dataset writes them to parquet: a caption, and the image under its format's name.

Schema: github.com/rom1504/img2dataset with output_format=parquet; the image column is called jpg, png or webp after
encode_format. The loss is on the caption.
"""

from typing import Any

import pyarrow as pa

from data_pipelines.rejection import BadRow
from idefics_jax.documents import Image, Part, Text

# What this project writes; img2dataset adds columns on the download.
SCHEMA = pa.schema([("key", pa.string()), ("png", pa.binary()), ("caption", pa.string()), ("url", pa.string())])
# What a file must have: one of these.
NEEDED = tuple(pa.schema([(image, pa.binary()), ("caption", pa.string())]) for image in ("jpg", "png", "webp"))


def parts(row: dict[str, Any], image_root: str | None) -> tuple[Part, ...]:
    """Turns a row into the parts of a document: the image, then its caption.

    Raises:
      BadRow: the image or the caption is missing.
    """
    del image_root  # a pair holds its image
    caption = row["caption"]
    data = next(value for name, value in row.items() if name != "caption")
    if data is None:
        raise BadRow("null-image", "it holds no image; drop the row")
    if not caption:
        raise BadRow("null-text", "it holds no caption; drop the row")
    return Image(data), Text(caption, trained=True)


def units(row: dict[str, Any]) -> int:
    """Returns 1: a pair is not cut."""
    del row
    return 1
