"""A folder being prepared: what was asked for, its units, and the manifest they add up to.

preparation.json holds what was asked for, so that a folder is never filled by two different commands. A lock keeps
two of the same apart.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines import filters, folder_lock, manifest
from data_pipelines.rejection import FILTERED, SMALLEST_SAMPLE
from data_pipelines.units import ASIDE, Recipe, Report, Unit, finished, shards_of, stamp_of_images
from idefics_jax import settings
from idefics_jax.errors import UserError

ASKED = "preparation.json"


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Inputs, what is made of them, and where; `output` is an absolute path."""

    recipe: Recipe
    inputs: tuple[str, ...]
    output: Path

    @property
    def units(self) -> list[Unit]:
        """One for each input; the folder of images is looked at, once for all of them."""
        images = stamp_of_images(self.recipe.image_root)
        return [Unit(number, path, self.recipe, self.output, images) for number, path in enumerate(self.inputs)]

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Holds the folder while it is worked on; what an interrupted run left aside goes.

        Raises:
          UserError: it holds something else, another preparation, or one that is at work now.
        """
        ours = {self.output / folder_lock.LOCK, *manifest.left_aside(self.output)}
        taken = self.output.exists() and not (self.output / ASKED).exists()
        if taken and not (self.output.is_dir() and ours.issuperset(self.output.iterdir())):
            raise UserError(f"--output: {self.output} holds something else; name an empty or a new folder")
        with folder_lock.locked(self.output):
            self._check_asked()
            for path in (*manifest.left_aside(self.output), *manifest.left_aside(self.output / "units")):
                path.unlink()
            shutil.rmtree(self.output / ASIDE, ignore_errors=True)
            if not all(map(finished, self.units)):
                (self.output / manifest.MANIFEST).unlink(missing_ok=True)  # it would tell of shards that change now
            try:
                yield
            finally:
                shutil.rmtree(self.output / ASIDE, ignore_errors=True)

    def finish(self, reports: Sequence[Report], max_bad_fraction: float, *, keep_cut_short: bool) -> dict[str, Any]:
        """Writes the manifest of finished units; returns it.

        Args:
          reports: of all units, in their order.
          max_bad_fraction: share of the rows that may be bad.
          keep_cut_short: whether inputs may break off, and what comes before stays.

        Raises:
          UserError: too many rows are bad, no row gives a document, every image is missing, or inputs break off.
        """
        check_bad_fraction(reports, max_bad_fraction, sample=1)
        check_not_barren(reports, least=1)
        cut_short = self._cut_short(reports)
        if cut_short and not keep_cut_short:
            path, message = next(iter(cut_short.items()))
            raise UserError(
                f"{len(cut_short)} of {len(reports)} inputs break off, such as {path}: {message}; then give the same "
                "command, or give it with --keep_cut_short to keep what comes before"
            )
        told = self._manifest(reports)
        path = self.output / manifest.MANIFEST
        if not path.exists() or path.read_bytes() != manifest.as_json(told):
            manifest.write_json(path, told)
        return told

    def _asked(self) -> dict[str, Any]:
        thresholds = {name: getattr(self.recipe.filters, name) for name in self.recipe.filters.named}
        captions = list(self.recipe.captions)
        return {
            "format": manifest.FORMAT,
            **dataclasses.asdict(self.recipe),
            "filters": thresholds,
            "captions": captions,
        }

    def _check_asked(self) -> None:
        path, asked, inputs = self.output / ASKED, self._asked(), list(self.inputs)
        if not path.exists():
            manifest.write_json(path, {**asked, "inputs": inputs})
            return
        try:
            before = json.loads(path.read_bytes())
            inputs_before = before.pop("inputs")
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}); delete the folder and prepare again") from error
        differ = settings.differences(before, asked)
        for change, paths in (
            ("no longer", [name for name in inputs_before if name not in set(inputs)]),
            ("newly", [name for name in inputs if name not in set(inputs_before)]),
        ):
            if paths:
                differ.append(f"{len(paths)} inputs {change} given, such as {paths[0]}")
        if differ or inputs != inputs_before:
            raise UserError(
                f"{self.output} holds another preparation ({'; '.join(differ) or 'the inputs come in another order'}); "
                "name another --output, or give the command that began it"
            )

    def _cut_short(self, reports: Sequence[Report]) -> dict[str, str]:
        """Returns the inputs that break off, each with the sentence that says where."""
        return {path: report.cut_short for path, report in zip(self.inputs, reports, strict=True) if report.cut_short}

    def _manifest(self, reports: Sequence[Report]) -> dict[str, Any]:
        shards = [shard for report in reports for shard in shards_of(report, self.output)]
        columns: dict[str, Any] = {}
        for report in reports:
            columns |= report.columns
        dropped = dropped_in(reports)
        asked = self._asked()
        return {
            "format": asked.pop("format"),
            "kind": asked.pop("kind"),
            "columns": columns,
            "documents": sum(report.documents for report in reports),
            "images": sum(report.images for report in reports),
            "bytes": sum(report.bytes for report in reports),
            "seen": sum(report.seen for report in reports),
            "dropped": {reason: told for reason, told in dropped.items() if not reason.startswith(FILTERED)},
            "cut_short": [
                {"input": os.path.basename(path), "message": message}
                for path, message in self._cut_short(reports).items()
            ],
            "filtered": {reason: told for reason, told in dropped.items() if reason.startswith(FILTERED)},
            "filtered_images": _summed([report.filtered_images for report in reports]),
            "asked": {name: value for name, value in asked.items() if name != "image_root"},
            "inputs": [os.path.basename(path) for path in self.inputs],
            "shards": [shard.told() for shard in shards],
            "digest": manifest.digest_of(shards),
        }


def dropped_in(reports: Sequence[Report]) -> dict[str, dict[str, Any]]:
    """Returns the dropped documents of all reports by reason, the most frequent first, with the first example."""
    total: dict[str, dict[str, Any]] = {}
    for report in reports:
        for reason, told in report.dropped.items():
            whole = total.setdefault(reason, {**told, "documents": 0})
            whole["documents"] += told["documents"]
    return dict(sorted(total.items(), key=lambda item: (-item[1]["documents"], item[0])))


def check_bad_fraction(reports: Sequence[Report], limit: float, *, sample: int = SMALLEST_SAMPLE) -> None:
    """Raises UserError if a larger share of the rows than `limit` was dropped as bad; filtered ones are not.

    As long as fewer rows than `sample` have been seen, the share is of so many.
    """
    bad = {reason: told for reason, told in dropped_in(reports).items() if not reason.startswith(FILTERED)}
    count, seen = sum(told["documents"] for told in bad.values()), sum(report.seen for report in reports)
    if count > limit * max(seen, sample):
        reasons = "; ".join(
            f"{reason} {told['documents']}, such as {told['example']}: {told['message']}"
            for reason, told in bad.items()
        )
        raise UserError(
            f"{count} of {seen} rows are bad ({reasons}), more than --max_bad_fraction {limit} allows; mend them, or "
            "give the same command with a larger one: it goes on after the last finished input"
        )


def check_not_barren(reports: Sequence[Report], *, least: int) -> None:
    """Raises UserError if so many rows have been read without one document, or without one of the images they name.

    What filters take and images that may be missing are no damage, but nothing but them is a mistake.
    """
    seen, documents = sum(report.seen for report in reports), sum(report.documents for report in reports)
    if seen < least:
        return
    if not documents:
        reasons = ", ".join(f"{reason} {told['documents']}" for reason, told in dropped_in(reports).items())
        raise UserError(f"none of {seen} rows is a document ({reasons}); look at --image_root and --filters")
    if not any(report.images for report in reports) and any(filters.MISSING in r.filtered_images for r in reports):
        raise UserError(
            f"not one of the images that {documents} documents name has been found; name the folder of the images, or "
            "of their index, as --image_root"
        )


def _summed(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    names = sorted({name for count in counts for name in count})
    return {name: sum(count.get(name, 0) for count in counts) for name in names}
