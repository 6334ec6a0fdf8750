"""The files in a tar, found from its headers alone: POSIX (ustar, pax) and GNU long names, uncompressed.

Headers are walked here because tarfile takes a damaged header for the end of the archive, reads extended headers of any
size, and keeps every member it has passed in memory.
"""

import dataclasses
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

_BLOCK = 512
# An extended header holds a name and a few numbers.
_LARGEST_HEADER = 1 << 20
# What writers fill the last record of an archive up to: tar's 10,240 bytes, or what its --blocking-factor says.
_RECORD_SIZES = (10_240, *(1 << power for power in range(9, 21)))
_LONG_NAME = tarfile.GNUTYPE_LONGNAME
_RECORDS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
# Headers that say something of the next one, and are no file themselves.
_EXTENSIONS = (_LONG_NAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE, *_RECORDS)


class BrokenTar(ValueError):
    """A tar that cannot be read on; what came before is whole."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name as written, the offset of its first byte, and its size."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO) -> Iterator[Member]:
    """Yields the regular files of a tar in order, whole ones only; directories, links and devices are passed over.

    Args:
      file: seekable; the caller may seek between members.

    Raises:
      BrokenTar: a header is damaged, the file ends before the mark that ends a tar, or zeros that are no such mark
        stand where a header does.
    """
    length, offset, said = os.fstat(file.fileno()).st_size, 0, {}
    while (header := _header(file, offset, length)) is not None:
        size = int(said.get("size", header.size)) if header.isreg() else header.size
        start = offset + _BLOCK
        if header.isreg() or header.type in _EXTENSIONS or header.type not in tarfile.SUPPORTED_TYPES:
            if not 0 <= size <= length - start:
                raise BrokenTar(f"it has {length} bytes and ends inside {header.name!r}")
            offset = start + -(-size // _BLOCK) * _BLOCK
        else:
            offset = start  # a directory, link or device has no content, whatever size it claims
        if header.type in _EXTENSIONS:
            said |= _extension(file, header, start)
            continue
        if header.isreg():
            yield Member(said.get("path", header.name), start, size)
        said = {}


def _header(file: BinaryIO, offset: int, length: int) -> tarfile.TarInfo | None:
    """Returns the header at an offset, None at the end of the archive."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise BrokenTar(f"it has {length} bytes and ends before the end of the archive")
    if not any(block):
        _check_end(file, offset, length)
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        raise BrokenTar(f"its header at byte {offset} is damaged ({error})") from None
    if header.type == tarfile.GNUTYPE_SPARSE:
        raise BrokenTar(f"it holds the sparse file {header.name!r}, whose parts are not read")
    return header


def _check_end(file: BinaryIO, offset: int, length: int) -> None:
    """Raises BrokenTar unless the zeros at an offset end the archive: two blocks and the rest of a record, no more.

    A download that reserved its length before its bytes came, and a lost block, leave zeros as well.
    """
    zeros = length - offset
    if zeros < 2 * _BLOCK:
        raise BrokenTar(f"it has {length} bytes and ends before the end of the archive")
    # The mark may be the first that is written into the last record.
    is_filled = any(length % size == 0 and zeros < size + 2 * _BLOCK for size in _RECORD_SIZES)
    file.seek(offset)
    if not is_filled or any(file.read(zeros)):
        raise BrokenTar(f"it has {length} bytes, and zeros from byte {offset} on that do not end the archive")


def _extension(file: BinaryIO, header: tarfile.TarInfo, start: int) -> dict[str, str]:
    """Returns what an extended header says of the path and the size of the next member."""
    if header.size > _LARGEST_HEADER:
        raise BrokenTar(f"its extended header at byte {start} has {header.size} bytes")
    content = file.read(header.size)
    if header.type == _LONG_NAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "backslashreplace")}
    if header.type not in _RECORDS:
        return {}
    found = {key: value for key, value in _records(content, start) if key in ("path", "size")}
    size = found.get("size", "0")
    if not (size.isascii() and size.isdigit() and len(size) < 20):
        raise BrokenTar(f"its extended header at byte {start} gives the size {size[:40]!r}")
    return found


def _records(content: bytes, start: int) -> Iterator[tuple[str, str]]:
    """Yields the pairs of an extended header, written as "length key=value" and a line feed."""
    position = 0
    while position < len(content):
        digits, space, _ = content[position : position + 20].partition(b" ")
        end = position + int(digits) if space and digits.isdigit() else 0
        if not position + len(digits) + 1 < end <= len(content):
            raise BrokenTar(f"its extended header at byte {start} is damaged")
        record = content[position + len(digits) + 1 : end - 1].decode("utf-8", "backslashreplace")
        key, _, value = record.partition("=")
        yield key, value
        position = end
