"""What a folder of prepared shards says of itself: manifest.json, and how it is put together and checked.

    {
      "format": 1,
      "kind": "obelics",
      "columns": {"images": ["bytes"], ...},        the form of every row (training_form.py)
      "documents": 1000, "images": 2310, "bytes": 123456789, "seen": 1004,
      "dropped": {"null-text": {"documents": 3, "example": "page.parquet:17", "message": "..."}},
      "cut_short": [{"input": "7.tar", "message": "..."}],      inputs that broke off; what comes before is kept
      "filtered": {...},                            documents that the filters took: no fault of the data
      "filtered_images": {...},                     images that they took out of documents that stayed
      "asked": {...}, "inputs": [...],              filters and sizes; the names of the files
      "shards": [{"name": "00000-00000.array_record", "records": 500, "bytes": 61728394, "sha256": "..."}, ...],
      "digest": "..."                               of the shards' digests, names and records
    }

The same inputs and settings give the same manifest to the byte, on any number of processes.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.training_form import Columns
from idefics_jax.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
SUFFIX = ".array_record"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard: its file, how many records it holds, its size and its SHA-256 in hex."""

    path: Path
    records: int
    bytes: int
    sha256: str

    def told(self) -> dict[str, Any]:
        """Returns what a manifest says of it."""
        return {"name": self.path.name, "records": self.records, "bytes": self.bytes, "sha256": self.sha256}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What training needs of a manifest: the kind and the columns of the rows, the shards, and their digest."""

    path: Path
    kind: str
    columns: Columns
    shards: tuple[Shard, ...]
    digest: str


def load(folder: Path) -> Manifest:
    """Returns the manifest of a prepared folder; raises UserError where there is none, or a damaged one."""
    path = folder / MANIFEST
    again = "prepare the folder again (python -m data_pipelines.prepare)"
    try:
        told = json.loads(path.read_bytes())
        if told["format"] != FORMAT:
            raise UserError(f"{path} is of format {told['format']!r}, this version reads {FORMAT}; {again}")
        shards = tuple(
            Shard(folder / os.path.basename(shard["name"]), shard["records"], shard["bytes"], shard["sha256"])
            for shard in told["shards"]
        )
        manifest = Manifest(path, told["kind"], told["columns"], shards, told["digest"])
        digest = digest_of(shards)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {MANIFEST}: its preparation has not ended, or never began; {again}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); {again}") from error
    if digest != manifest.digest:
        raise UserError(f"{path} is damaged: its shards' digests do not make up its own; {again}")
    return manifest


def load_all(paths: Sequence[str]) -> list[Manifest]:
    """Returns the manifests of prepared folders, and of shards in such folders with those shards alone.

    Raises:
      UserError: a folder has no manifest, a shard is none of its folder's, or two paths lead to one shard.
    """
    folders: dict[Path, list[str]] = {}
    for path in map(Path, paths):
        folder, name = (path, "") if path.is_dir() else (path.parent, path.name)
        folders.setdefault(folder, []).append(name)
    manifests = []
    for folder, names in folders.items():
        whole = load(folder)
        if names != [""]:
            shards = {shard.path.name: shard for shard in whole.shards}
            for name in names:
                if name not in shards:
                    raise UserError(
                        f"{folder / name} is not among the shards of {whole.path}; name the folder, or shards of it"
                    )
            whole = dataclasses.replace(whole, shards=tuple(shards[name] for name in names))
        manifests.append(whole)
    led: dict[str, Path] = {}
    for shard in (shard for found in manifests for shard in found.shards):
        if (other := led.setdefault(os.path.realpath(shard.path), shard.path)) is not shard.path:
            raise UserError(f"{other} and {shard.path} are the same shard; name it once and raise the source's weight")
    return manifests


def digest_of(shards: Sequence[Shard]) -> str:
    """Returns the SHA-256 of the shards' digests, names and numbers of records, in hex."""
    lines = [f"{shard.sha256} {shard.records} {shard.path.name}\n" for shard in shards]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_sizes(shards: Sequence[Shard]) -> None:
    """Raises UserError naming the first shard that is missing or not as long as its manifest says."""
    for fault in filter(None, map(fault_of, shards)):
        raise UserError(fault)


def fault_of(shard: Shard) -> str | None:
    """Returns the sentence that says how a shard is missing or not as long as its manifest says, if so."""
    found = shard.path.stat().st_size if shard.path.is_file() else None
    if found == shard.bytes:
        return None
    was = "is missing" if found is None else f"has {found} bytes where its manifest says {shard.bytes}"
    return f"{shard.path} {was}; prepare it again (the same command mends only what is missing)"


def check_digests(shards: Sequence[Shard]) -> None:
    """Raises UserError naming every shard whose content is not what its manifest says."""
    check_sizes(shards)
    changed = [str(shard.path) for shard in shards if sha256_of(shard.path) != shard.sha256]
    if changed:
        raise UserError(f"{', '.join(changed)}: not the bytes of the manifest; delete and prepare again")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(value: Mapping[str, Any]) -> bytes:
    """Returns the bytes that `write_json` writes."""
    return f"{json.dumps(value, indent=1)}\n".encode()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a file that is never seen half-written, and is on the disk when this returns."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "wb") as file:
        file.write(as_json(value))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def left_aside(folder: Path) -> list[Path]:
    """Returns what `write_json` left behind in a folder where it was killed."""
    return list(folder.glob(".*.json.[0-9]*"))
