"""Where the data stands, in files: one for each virtual shard, so that any number of processes can take it up.

about.json       everything that the sequence of batches depends on, and the number of workers, which it does not
shard_<k>.json   where shard k stands
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
from etils import epath

from idefics_jax import buckets
from idefics_jax.errors import UserError
from idefics_jax.settings import differences

# In a work directory: where the data stood when the run had ended.
FOLDER = "data_position"
_ABOUT = "about.json"
# What a run that goes on with other settings reads of them.
_ABOUT_FIELDS = ("data.virtual_shards", "files", "earlier")
_SHARD_FIELDS = ("packed.positions", "packed.waiting", "packed.left")


def write(folder: epath.Path, data: grain.DatasetIterator, *, first_process: bool) -> None:
    """Writes where the shards of this process stand; the first process also writes what they depend on."""
    state = data.get_state()
    for shard, own in state["shards"].items():
        _file(folder, shard).write_text(json.dumps(own, indent=1))
    if first_process:
        (folder / _ABOUT).write_text(state["about"])


def is_written(folder: epath.Path) -> bool:
    """Whether a folder holds what `write` writes, by the two files that every run has."""
    return (folder / _ABOUT).exists() and _file(folder, 0).exists()


def restore(folder: epath.Path, data: grain.DatasetIterator) -> None:
    """Sets an iterator to what `write` wrote, whichever of the shards it holds.

    Raises:
      UserError: the position is one in other data, or with other settings.
    """
    files = {shard: _file(folder, shard) for shard in data.get_state()["shards"]}
    # With another number of shards some are not there; what they depend on is compared before they are looked at.
    saved = {shard: json.loads(file.read_text()) for shard, file in files.items() if file.exists()}
    data.set_state({"about": (folder / _ABOUT).read_text(), "shards": saved})


@dataclasses.dataclass(frozen=True)
class Reached:
    """How far a shard of an ended run had read.

    Attributes:
      positions: how many rows of each source.
      waiting: (source, position) of those rows of which nothing had been packed.
      left: names of pieces that waited of rows of which others had been packed.
    """

    positions: dict[str, int]
    waiting: tuple[tuple[str, int], ...]
    left: tuple[str, ...]


def reached(workdir: str, shards: Sequence[int], about: dict[str, Any]) -> list[Reached]:
    """Returns how far the shards of an ended run had read, for a run that goes on with other settings.

    A row that was cut and of which some pieces had been packed counts as read: the new run may cut it otherwise. Its
    other pieces are not trained on, and the new run counts them as packed_rows.LEFT_BEHIND.

    Args:
      workdir: the ended run's work directory.
      shards: numbers of the shards.
      about: of the run that goes on. The sources of both runs must have the same files in the same order.

    Raises:
      UserError: there is no such run, it had another number of shards, a source had other files or another order, or
        its position is damaged or of another version of this code.
    """
    folder = _folder(workdir)
    before = _load(folder / _ABOUT, _ABOUT_FIELDS)
    was, is_now = before["data"]["virtual_shards"], about["data"]["virtual_shards"]
    if was != is_now:
        raise UserError(
            f"data.after is {workdir!r}, a run of {was} virtual shards; this one has {is_now}, give as many"
        )
    known = sources_of(before)
    for name in sorted(known.keys() & about["files"].keys()):
        changed = differences(known[name], about["files"][name])
        if changed:
            raise UserError(
                f"data.after is {workdir!r}, where source {name!r} had other files or another order "
                f"({'; '.join(changed)}); give them as they were, or the source another name, to begin it anew"
            )
    packed = [_load(_file(folder, shard), _SHARD_FIELDS)["packed"] for shard in shards]
    return [
        Reached(
            json.loads(state["positions"]),
            tuple(map(tuple, json.loads(state["waiting"]))),
            tuple(json.loads(state["left"])),
        )
        for state in packed
    ]


def identity(workdir: str) -> tuple[str, dict[str, Any]]:
    """Returns the digest of where an ended run left its data, and its `sources_of`; raises UserError as `reached`."""
    folder = _folder(workdir)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    return digest, sources_of(_load(folder / _ABOUT, _ABOUT_FIELDS))


def sources_of(about: dict[str, Any]) -> dict[str, Any]:
    """Returns files and order of each source of a run, and of those that only the runs before it read."""
    return {**about["earlier"], **about["files"]}


def keep(workdir: str, folder: epath.Path) -> None:
    """Copies where an ended run left its data; the folder can then stand for its work directory in `reached`."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for file in _folder(workdir).iterdir():
        file.copy(folder / FOLDER / file.name, overwrite=True)


def check_fields(saved: Mapping[str, Any], fields: Iterable[str], *, where: str, mend: str) -> None:
    """Raises UserError if a part of a saved position lacks fields, of which `field_names` gives the names.

    `where` says which part; `mend` closes the message.
    """
    there = set(field_names(saved))
    lacking = [name for name in fields if name not in there]
    if lacking:
        raise UserError(f"{where} lacks {', '.join(lacking)}, so another version of this code wrote it; {mend}")


def field_names(state: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted name of each field of a state, groups and what is in them."""
    for name, value in state.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from field_names(value, f"{prefix}{name}.")


def _load(file: epath.Path, fields: Iterable[str]) -> dict[str, Any]:
    """Returns a file of an ended run's position, which has at least some fields."""
    try:
        saved = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); put it back from a copy, or leave data.after out") from None
    mend = "let that version go on, or leave data.after out to begin all sources anew"
    check_fields(saved, fields, where=str(file), mend=mend)
    return saved


def _folder(workdir: str) -> epath.Path:
    buckets.check(workdir)
    folder = epath.Path(workdir) / FOLDER
    if not (folder / _ABOUT).exists():
        raise UserError(f"data.after is {workdir!r}, which holds no {FOLDER}; give the workdir of a run that has ended")
    return folder


def _file(folder: Any, shard: int | str) -> Any:
    return folder / f"shard_{shard}.json"
