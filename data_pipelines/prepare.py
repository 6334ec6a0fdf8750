"""Converts files in a published form to the training form: ArrayRecord shards and their manifest.

    python -m data_pipelines.prepare --kind obelics --input 'pages/*.parquet' --output shards --image_root downloads
    python -m data_pipelines.prepare --output shards --verify

Inputs are parquet files, webdataset tars, JSON lines and TFDS shards, as the kind is published (readers.py). Each input
is a unit of work (units.py); processes of this machine do them, or the workers of Apache Beam, with the same bytes
either way:

    python -m data_pipelines.prepare ... --runner DirectRunner [options of Beam, to the end of the line]

The same command goes on after an interruption, and does nothing where all is done. Rows that are no documents are
dropped, and counted by reason with an example in OUTPUT/manifest.json; training reads OUTPUT as a source's path.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines import filters, image_files, manifest, parquet, prepare_beam, prepare_pool, readers, tfds_source
from data_pipelines.kinds import KINDS
from data_pipelines.preparation import Preparation, check_bad_fraction, check_not_barren
from data_pipelines.progress import Progress
from data_pipelines.rejection import MOST_BARREN
from data_pipelines.units import Recipe, Report, finished, stamp_of
from idefics_jax.errors import UserError

RUNNER = "--runner"


def open_inputs(recipe: Recipe, patterns: Sequence[str], output: Path) -> Preparation:
    """Returns the preparation of the files that patterns name; those that can be checked without reading them are.

    Raises:
      UserError: a file or the image_root is missing, or a file has no reader, or other columns than the kind's.
    """
    inputs = parquet.expand(patterns, where="--input")
    image_files.check_root(recipe.image_root, where="--image_root")
    for path in inputs:
        readers.reader_of(path, recipe.features)
    sets = [path for path in inputs if tfds_source.is_shard(path)]
    if recipe.features and not sets:
        raise UserError("--features are for TFDS sets, and --input names none; leave them out")
    if sets:
        tfds_source.TfdsRows(sets, recipe.kind, recipe.features)
    for footer in parquet.footers_or_faults([path for path in inputs if path.endswith(".parquet")]):
        if footer.fault:  # told at the end, with those that break off
            continue
        columns = readers.parquet_columns(footer, recipe.kind)
        lacking = [name for name in recipe.captions if name not in columns]
        if lacking:
            has = ", ".join(columns)
            raise UserError(f"{footer.path} has no column {lacking[0]} of texts, which --captions names; it has {has}")
    return Preparation(recipe, tuple(str(Path(path).absolute()) for path in inputs), output.absolute())


def prepare(
    preparation: Preparation, *, processes: int, max_bad_fraction: float, keep_cut_short: bool
) -> dict[str, Any]:
    """Prepares all inputs on this machine, and tells on stderr how it goes; returns the manifest.

    Raises:
      UserError: the folder holds something else, an input cannot be read, more than `max_bad_fraction` of the rows
        are bad, none is a document, every image is missing, or inputs break off and `keep_cut_short` is not given.
    """
    with preparation.begun():
        units = preparation.units
        reports = {unit.number: report for unit in units if (report := finished(unit))}
        rest = [unit for unit in units if unit.number not in reports]
        if reports:
            print(f"{len(reports)} of {len(preparation.inputs)} inputs are prepared already", file=sys.stderr)
        progress = Progress({unit.number: stamp_of(unit.input)[0] for unit in rest}, sys.stderr)

        def watch(begun: Mapping[int, Report], done: Sequence[int]) -> None:
            progress.show(begun, done)
            so_far = [*reports.values(), *begun.values()]
            check_bad_fraction(so_far, max_bad_fraction)
            check_not_barren(so_far, least=MOST_BARREN)

        if rest:
            made = prepare_pool.run(rest, processes, watch)
            progress.end(made, list(made))
            reports |= made
        return preparation.finish(
            [reports[number] for number in sorted(reports)], max_bad_fraction, keep_cut_short=keep_cut_short
        )


def verify(folder: Path) -> manifest.Manifest:
    """Returns a folder's manifest after reading every shard; raises UserError that names what is not as it says."""
    told = manifest.load(folder)
    manifest.check_digests(told.shards)
    return told


def main() -> None:
    # What follows --runner, and the runner itself, is for Beam.
    asked, beam = sys.argv[1:], None
    for place, argument in enumerate(asked):
        if argument.partition("=")[0] == RUNNER:
            asked, beam = asked[:place], asked[place:]
            break
    parser = _parser()
    arguments = parser.parse_args(asked)
    known = {f"--{name}" for name in vars(arguments)}
    ours = [option for option in beam or () if option.partition("=")[0] in known]
    if ours:
        parser.error(f"{', '.join(ours)} after {RUNNER}, where all is Beam's; give it before")
    if not arguments.verify and not (arguments.kind and arguments.input):
        parser.error("give --kind and --input, or --verify")
    try:
        if arguments.verify:
            told = verify(arguments.output)
            print(f"{arguments.output}: all {len(told.shards)} shards are as {told.path.name} says, {told.digest}")
        else:
            print(_summary(arguments.output, _prepare(arguments, beam)))
    except UserError as error:
        parser.error(" ".join(str(error).split()))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; give the same command again to go on\n")


def _prepare(arguments: argparse.Namespace, beam: list[str] | None) -> dict[str, Any]:
    for name, least in (("processes", 1), ("shard_mib", 1), ("max_pixels", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} is {getattr(arguments, name)}; it must be at least {least}")
    if not 0 <= arguments.max_bad_fraction < 1:
        raise UserError(f"--max_bad_fraction is {arguments.max_bad_fraction}; it must be at least 0 and less than 1")
    thresholds = filters.parse(arguments.filters)
    filters.check_kind(thresholds, arguments.kind, where="--filters")
    if arguments.captions and arguments.kind != "pairs":
        raise UserError(f"--captions are for kind 'pairs', not {arguments.kind!r}; leave them out")
    root = arguments.image_root
    if root is not None and arguments.kind in ("pairs", "text"):
        raise UserError(f"--image_root is not for kind {arguments.kind!r}, whose rows name no images; leave it out")
    recipe = Recipe(
        kind=arguments.kind,
        image_root=None if root is None else str(Path(root).absolute()),
        filters=thresholds,
        captions=tuple(filter(None, arguments.captions.split(","))),
        features=_table(arguments.features),
        max_pixels=arguments.max_pixels,
        shard_mib=arguments.shard_mib,
    )
    preparation = open_inputs(recipe, arguments.input, arguments.output)
    allowed = {"max_bad_fraction": arguments.max_bad_fraction, "keep_cut_short": arguments.keep_cut_short}
    if beam is not None:
        return prepare_beam.prepare(preparation, beam, **allowed)
    return prepare(preparation, processes=arguments.processes, **allowed)


class _Once(argparse.Action):
    """Stores what an option says, and refuses to be given again, which would leave out what it said before."""

    _is_given = False

    def __call__(self, parser, namespace, values, option_string=None):
        if self._is_given:
            parser.error(f"{option_string} is given twice; give it once")
        self._is_given = True
        setattr(namespace, self.dest, values)


def _table(text: str) -> dict[str, str]:
    """Reads "field=feature,field=feature"."""
    pairs = [item.partition("=") for item in filter(None, text.split(","))]
    for field, equals, feature in pairs:
        if not (field and equals and feature):
            raise UserError(f"--features has {field + equals + feature!r}; write FIELD=FEATURE,FIELD=FEATURE")
    table = {field: feature for field, _, feature in pairs}
    if len(table) < len(pairs):
        raise UserError(f"--features {text!r} names a field twice; give each one feature")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.register("action", None, _Once)
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--kind", choices=KINDS, help="what the inputs hold")
    parser.add_argument("--input", action="extend", nargs="+", help="files, as paths or globs; may be repeated")
    parser.add_argument("--image_root", help="folder or index (image_store.py) of images that rows name")
    parser.add_argument("--filters", default="", help="name=threshold,name=threshold (filters.py)")
    parser.add_argument("--captions", default="", help="column,... of pairs; one with any of them stays")
    parser.add_argument("--features", default="", help="field=feature,... of TFDS sets (tfds_source.py)")
    parser.add_argument("--max_pixels", type=int, default=64_000_000, help="drop documents with larger images")
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="share of bad rows that stops the run")
    parser.add_argument("--keep_cut_short", action="store_true", help="keep what precedes where an input breaks off")
    parser.add_argument("--shard_mib", type=int, default=256, help="size of a shard, in MiB")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="that work at once")
    parser.add_argument("--verify", action="store_true", help="check the shards in OUTPUT against its manifest")
    return parser


def _summary(output: Path, told: dict[str, Any]) -> str:
    """Returns what a manifest holds, in a few lines."""
    lines = [
        f"{output}: {told['documents']} documents with {told['images']} images, "
        f"{told['bytes'] / 2**20:.1f} MiB in {len(told['shards'])} shards"
    ]
    for name in ("dropped", "filtered"):
        for reason, what in told[name].items():
            lines.append(f"  {name} {what['documents']}: {reason}, such as {what['example']}: {what['message']}")
    lines += [f"  CUT SHORT: {one['input']}: {one['message']}" for one in told["cut_short"]]
    lines += [f"  images taken {count}: {reason}" for reason, count in told["filtered_images"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
