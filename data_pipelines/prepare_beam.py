"""Units of preparation (units.py) as an Apache Beam pipeline, for corpora that outgrow one machine.

The work is the process pool's: each worker calls units.prepare_unit, and the reports are combined into the same
manifest. Workers see the inputs and the output at the same paths (a network file system). Beam pins older versions of
libraries that training needs newer, so it has an environment of its own: requirements-beam.txt.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

from data_pipelines import manifest
from data_pipelines.preparation import Preparation
from data_pipelines.units import Report, Unit, prepare_unit
from idefics_jax.errors import UserError

_FAILURE = ".failure"


def prepare(
    preparation: Preparation, options: Sequence[str], *, max_bad_fraction: float, keep_cut_short: bool
) -> dict[str, Any]:
    """Prepares all inputs on a Beam runner; returns the manifest.

    Args:
      preparation: what to do.
      options: of the pipeline, as on a command line: ["--runner", "DirectRunner", ...].
      max_bad_fraction, keep_cut_short: as Preparation.finish; they are judged when all units are done.

    Raises:
      UserError: Beam is not installed; or as prepare.prepare.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            f"--runner needs Apache Beam ({error}); give the command in the environment of requirements-beam.txt "
            "(make beam makes it in .venv-beam)"
        ) from error
    failure = preparation.output / _FAILURE
    with preparation.begun():
        failure.unlink(missing_ok=True)
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            _ = (
                pipeline
                | "Inputs" >> beam.Create(preparation.units)
                | "Spread" >> beam.Reshuffle()
                | "Prepare" >> beam.Map(_attempt)
                | "Combine" >> beam.combiners.ToList()
                | "Manifest" >> beam.Map(functools.partial(_finish, preparation, max_bad_fraction, keep_cut_short))
            )
        if failure.exists():
            raise UserError(failure.read_text())
        return json.loads((preparation.output / manifest.MANIFEST).read_bytes())


def _attempt(unit: Unit) -> tuple[int, Report | str]:
    """Returns a unit's number, and its report or the sentence that says why there is none.

    Beam would wrap what a person can mend in pages of its own stack, and try it again in vain; other faults are its.
    """
    try:
        return unit.number, prepare_unit(unit)
    except UserError as error:
        return unit.number, str(error)


def _finish(
    preparation: Preparation,
    max_bad_fraction: float,
    keep_cut_short: bool,
    outcomes: list[tuple[int, Report | str]],
) -> None:
    """Writes the manifest, or the sentence that says why there is none."""
    reports = [report for _, report in sorted(outcomes, key=lambda outcome: outcome[0])]
    try:
        for report in reports:
            if isinstance(report, str):
                raise UserError(report)
        preparation.finish(reports, max_bad_fraction, keep_cut_short=keep_cut_short)
    except UserError as error:
        (preparation.output / _FAILURE).write_text(str(error))
