"""One unit of preparation: one input file into finished shards and a report of what became of its rows.

Shards are written aside and renamed, then the report (units/NUMBER.json) makes them count; a unit that is killed at
any point leaves nothing that counts. A unit whose report is there, whose input and image_root have the sizes and times
of change that the report names, and whose shards have their sizes, is finished and is not done again. Whether processes
of this machine or workers of Apache Beam run it, the bytes are the same.

Images that come to an image_root later, or go, are thus seen in its index, which is built anew, and in its folder and
those below, each of which has a time of change; an image written over under its name is not. To prepare again with
those, delete OUTPUT/units.
"""

import collections
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines import filters, image_index, manifest, pairs, readers, records, training_form
from data_pipelines.filters import Filters
from data_pipelines.kinds import KINDS
from data_pipelines.manifest import Shard
from data_pipelines.rejection import CUT_SHORT, BadRow, Rejected
from idefics_jax import image_gate
from idefics_jax.documents import Image, Part
from idefics_jax.errors import UserError
from idefics_jax.image_gate import RejectedImage

ASIDE = ".aside"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides, with the input, the bytes of the shards.

    Attributes:
      kind: of the rows, a name in kinds.KINDS.
      image_root: where images that the rows only name are found (image_files.py); None if they hold them.
      filters: what to leave out.
      captions: columns of pairs, of which each must hold a text; none for the column `caption` alone.
      features: field of a row -> feature of a TFDS set, where that is not as in tfds_source.FIELDS.
      max_pixels: most pixels of an image; a document with a larger one is dropped.
      shard_mib: size at which another shard begins, in MiB.
    """

    kind: str
    image_root: str | None
    filters: Filters
    captions: tuple[str, ...]
    features: dict[str, str]
    max_pixels: int
    shard_mib: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is to be done with one input.

    Attributes:
      number: its place among the inputs, from 0.
      input: its path.
      recipe: how.
      output: the folder to fill.
      images: `stamp_of_images` of the recipe's image_root.
    """

    number: int
    input: str
    recipe: Recipe
    output: Path
    images: tuple[int, int]

    @property
    def report_path(self) -> Path:
        """Where its report is written."""
        return self.output / "units" / f"{self.number:05}.json"


@dataclasses.dataclass
class Report:
    """What became of a unit's rows, so far or in all.

    Attributes:
      seen: rows read.
      cut_short: the sentence that says where the input breaks off; empty if it does not.
      documents: rows kept.
      images: images in those.
      bytes: of the records.
      filtered_images: images that filters took out of documents that stayed, by reason.
      dropped: by reason, {"documents": how many, "example": the id of the first, "message": why}.
      columns: of the rows, as training_form.py says.
      shards: finished ones, as manifest.Shard tells of them.
    """

    seen: int = 0
    cut_short: str = ""
    documents: int = 0
    images: int = 0
    bytes: int = 0
    filtered_images: dict[str, int] = dataclasses.field(default_factory=dict)
    dropped: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def drop(self, document: Rejected) -> None:
        """Counts a row that is not kept."""
        first = {"documents": 0, "example": document.name, "message": document.message}
        self.dropped.setdefault(document.reason, first)["documents"] += 1


def prepare_unit(unit: Unit, watch: Callable[[Unit, Report], None] = lambda unit, report: None) -> Report:
    """Prepares a unit, unless it is finished.

    Args:
      unit: what to do.
      watch: told of the report after each row; what it raises ends the unit.

    Raises:
      UserError: the input cannot be read at all, or the shards cannot be written.
    """
    report = finished(unit)
    if report is not None:
        return report
    stamps, report = _stamps_of(unit), Report(columns=dict(training_form.COLUMNS[unit.recipe.kind]))
    (unit.output / ASIDE).mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{unit.number:05}-", dir=unit.output / ASIDE))
    try:
        kept = _records(unit, report, watch)
        shards = records.write_shards(
            kept, aside, prefix=f"{unit.number:05}", shard_bytes=unit.recipe.shard_mib * 2**20
        )
        report.shards = [shard.told() for shard in _publish(unit, shards)]
    except RuntimeError as error:
        raise UserError(
            f"{unit.output}: a shard cannot be written ({error}); free some space, and give the same command again: "
            "it goes on after the last finished input"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    unit.report_path.parent.mkdir(exist_ok=True)
    manifest.write_json(unit.report_path, {"input": unit.input, "stamps": stamps, **dataclasses.asdict(report)})
    return report


def finished(unit: Unit) -> Report | None:
    """Returns the report of a unit that need not be done again, else None."""
    try:
        told = json.loads(unit.report_path.read_bytes())
        if told.pop("input") != unit.input or told.pop("stamps") != _stamps_of(unit):
            return None
        report = Report(**told)
        manifest.check_sizes(shards_of(report, unit.output))
    except (OSError, ValueError, KeyError, TypeError):  # UserError is a ValueError
        return None
    return report


def shards_of(report: Report, folder: Path) -> list[Shard]:
    """Returns the shards that a report names."""
    return [Shard(folder / told["name"], told["records"], told["bytes"], told["sha256"]) for told in report.shards]


def stamp_of(path: str) -> list[int]:
    """Returns [size, time of change in ns] of an input: of a folder, those of all its files, added and the latest.

    The content is not read: an input of terabytes is told apart in no time, one changed under the same size and time
    is not.
    """
    files = [Path(path)] if not os.path.isdir(path) else [file for file in Path(path).rglob("*") if file.is_file()]
    stats = [file.stat() for file in files]
    return [sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]


def stamp_of_images(root: str | None) -> tuple[int, int]:
    """Returns what tells whether images have come to an image_root or gone: of its index, [size, time of change in ns].

    Without an index, how many folders it has and the latest of their times of change. Names are listed and no file is
    looked at: a second for a million of them.
    """
    if root is None:
        return 0, 0
    head = Path(root, image_index.HEAD)
    if head.is_file():
        size, changed = stamp_of(str(head))
        return size, changed
    times: dict[str, int] = {}
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real not in times:  # a link may lead back
            times[real] = os.stat(folder).st_mtime_ns
            with os.scandir(folder) as entries:
                waiting += [entry.path for entry in entries if entry.is_dir()]
    return len(times), max(times.values())


def _stamps_of(unit: Unit) -> dict[str, list[int]]:
    """Returns what tells whether what a unit reads has changed."""
    return {"input": stamp_of(unit.input), "image_root": list(unit.images)}


def _records(unit: Unit, report: Report, watch: Callable[[Unit, Report], None]) -> Iterator[bytes]:
    """Yields the records of the rows that are kept, and counts all."""
    kind = unit.recipe.kind
    for name, row in readers.reader_of(unit.input, unit.recipe.features)(unit.input, kind):
        if isinstance(row, Rejected) and row.reason in CUT_SHORT:
            report.cut_short = row.message
            continue
        report.seen += 1
        try:
            stored = None if isinstance(row, Rejected) else _stored(unit, row, report)
            record = stored and records.encode(name, stored)
        except (BadRow, RejectedImage) as error:
            row, record = Rejected(name, error.reason, str(error)), None
        if record is None:
            report.drop(row)
        else:
            report.documents += 1
            report.images += training_form.images_in(kind, stored)
            report.bytes += len(record)
            report.columns |= training_form.columns_of(kind, stored)
            yield record
        watch(unit, report)


def _stored(unit: Unit, row: dict[str, Any], report: Report) -> dict[str, Any]:
    """Returns a row as it is kept, having made its document once; raises BadRow or RejectedImage."""
    recipe = unit.recipe
    stored = training_form.training_row(
        recipe.kind, row, recipe.image_root, max_missing=recipe.filters.document_max_missing_images
    )
    missing = len(row["images"]) - len(stored["images"]) if recipe.kind == "obelics" else 0
    stored, taken = filters.apply(recipe.filters, stored, recipe.kind)
    taken[filters.MISSING] += missing
    captioned = pairs.with_caption(stored, tuple((name, 1.0) for name in recipe.captions), 0.0)
    _check_images(KINDS[recipe.kind].parts(captioned, None), recipe.max_pixels)
    report.filtered_images = dict(sorted((collections.Counter(report.filtered_images) + taken).items()))
    return stored


def _check_images(parts: tuple[Part, ...], max_pixels: int) -> None:
    """Raises RejectedImage if an image's header is not one; no pixel is decoded."""
    for part in parts:
        if isinstance(part, Image):
            image_gate.open_image(part.data, max_pixels=max_pixels)


def _publish(unit: Unit, shards: list[Shard]) -> list[Shard]:
    """Moves shards to their places, removes what an earlier run had there beyond them, and returns them there."""
    placed = [dataclasses.replace(shard, path=unit.output / shard.path.name) for shard in shards]
    for aside, shard in zip(shards, placed, strict=True):
        os.replace(aside.path, shard.path)
    for path in unit.output.glob(f"{unit.number:05}-*{manifest.SUFFIX}"):
        if path not in {shard.path for shard in placed}:
            path.unlink()
    return placed
