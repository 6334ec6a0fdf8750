"""Webdataset tars, read in one pass: members that share a key are a sample, and a sample is a row of a kind.

The key is a member's name up to the first dot after its last slash, as in github.com/webdataset/webdataset; the rest is
the suffix, and the members of a sample follow each other. What samples hold, by kind:

    pairs    jpg, png or webp, the caption in txt or json: img2dataset with output_format=webdataset
    pdf      pdf or tif, the lines of its pages in json: OCR-IDL and PDFA (scans.py)

Nothing is extracted, and no name becomes a path: `../` in one does no harm. Of a sample only the wanted members are
read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_pipelines import scans, strict_json
from data_pipelines.rejection import BadRow, Rejected
from data_pipelines.tar_members import BrokenTar, Member, members
from idefics_jax.errors import UserError

# A scanned book is tens of MiB; what is larger than this is not read into memory.
LARGEST_MEMBER = 512 << 20
# Suffixes of a pair's image; the first that is there is taken.
_IMAGES = ("jpg", "jpeg", "png", "webp")
# What img2dataset's json says of the download rather than of the picture.
_NOTES = frozenset(("caption", "image", "key", "status", "error_message", "exif", "sha256", "md5"))


class Sample:
    """The members of a tar that share a key, by suffix; their bytes are read when asked for."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._members: dict[str, Member] = {}
        self._repeated: str | None = None

    def __contains__(self, suffix: str) -> bool:
        return suffix in self._members

    def __str__(self) -> str:
        return ", ".join(f".{suffix}" for suffix in self._members)

    def add(self, suffix: str, member: Member) -> None:
        """Adds a member."""
        if suffix in self._members:
            self._repeated = suffix
        self._members[suffix] = member

    def read(self, suffix: str) -> bytes:
        """Returns the bytes of a member.

        Raises:
          BadRow: it is larger than LARGEST_MEMBER, or the sample has two members of one suffix.
        """
        if self._repeated is not None:
            raise BadRow("duplicate-member", f"it has two members .{self._repeated}; give each sample its own key")
        member = self._members[suffix]
        if member.size > LARGEST_MEMBER:
            raise BadRow("too-large", f"its .{suffix} has {member.size} bytes; the most read is {LARGEST_MEMBER}")
        self._file.seek(member.offset)
        return self._file.read(member.size)


def read(path: str, kind: str) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """Yields (id, row) for the samples of a tar in order; the id is "file:key".

    Of a tar that breaks off the samples before its last are given, then one Rejected that names the file.

    Args:
      path: an uncompressed tar.
      kind: "pairs" or "pdf".

    Raises:
      UserError: the file cannot be read, or a tar does not hold this kind.
    """
    if kind not in _ROWS:
        raise UserError(f"{path} is a tar, which holds kind {' or '.join(_ROWS)}, not {kind!r}; name other files")
    name = Path(path).name
    try:
        with open(path, "rb") as file:
            for key, sample in _samples(file):
                yield from _rows(f"{name}:{key}", sample, kind)
    except BrokenTar as error:
        yield name, Rejected(name, "broken-tar", f"{error}; download or write it again")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); name a tar") from error


def _samples(file: BinaryIO) -> Iterator[tuple[str, Sample]]:
    """Yields (key, sample); the last sample of a tar that breaks off may lack members and does not come."""
    current, sample = None, Sample(file)
    for member in members(file):
        folder, slash, last = member.name.rpartition("/")
        stem, dot, suffix = last.partition(".")
        if not stem or not dot:
            continue  # hidden files, and files without a suffix
        key = f"{folder}{slash}{stem}"
        if key != current:
            if current is not None:
                yield current, sample
            current, sample = key, Sample(file)
        sample.add(suffix.lower(), member)
    if current is not None:
        yield current, sample


def _rows(name: str, sample: Sample, kind: str) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    try:
        for part, row in _ROWS[kind](sample):
            yield f"{name}{part}", row
    except BadRow as error:
        yield name, Rejected(name, error.reason, str(error))


def _pair(sample: Sample) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the one row of a pair: its image, its caption, and whatever else its json says in words."""
    image = next((suffix for suffix in _IMAGES if suffix in sample), None)
    if image is None:
        raise BadRow("null-image", f"it has {sample}; a pair's image is .jpg, .png or .webp")
    fields = strict_json.parse(sample.read("json")) if "json" in sample else {}
    if not isinstance(fields, dict):
        raise BadRow("bad-json", "its .json is no object; write the fields of the pair")
    words = {key: value for key, value in fields.items() if isinstance(value, str)}
    caption = strict_json.text(sample.read("txt")) if "txt" in sample else words.get("caption")
    others = {key: value for key, value in words.items() if key not in _NOTES}
    yield "", {"image": sample.read(image), "caption": caption, **others}


def _scan(sample: Sample) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a scanned document."""
    source = next((suffix for suffix in scans.SOURCES if suffix in sample), None)
    if source is None or "json" not in sample:
        raise BadRow("null-image", f"it has {sample}; a scan is .{' or .'.join(scans.SOURCES)} with its .json")
    return scans.rows(source, sample.read(source), strict_json.parse(sample.read("json")))


_ROWS = {"pairs": _pair, "pdf": _scan}
