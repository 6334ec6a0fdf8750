"""Tars for tests."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], layout: int = tarfile.PAX_FORMAT) -> str:
    """Writes (name, content) as regular files, and returns the path."""
    with tarfile.open(path, "w", format=layout) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # webdataset's times have fractions, which need pax headers
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def pdfa(texts: Sequence[Sequence[str]]) -> bytes:
    """The json of PDFA: lines below words and boxes."""
    pages = [{"words": {"text": []}, "lines": {"text": list(lines), "bbox": []}, "images_bbox": []} for lines in texts]
    return as_json({"pages": pages})


def idl(texts: Sequence[Sequence[str]]) -> bytes:
    """The json of OCR-IDL: lines at the page."""
    return as_json({"pages": [{"text": list(lines), "bbox": [], "poly": [], "score": []} for lines in texts]})


def tiff(sizes: Sequence[tuple[int, int]], mode: str = "1") -> bytes:
    """A TIFF of several pages of (width, height), each with a bar of its own."""
    pages = []
    for i, (width, height) in enumerate(sizes):
        page = np.full((height, width), 255, np.uint8)
        page[10 * i : 10 * i + 10] = 0
        pages.append(PIL.Image.fromarray(page).convert(mode))
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    return file.getvalue()
