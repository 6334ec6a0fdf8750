"""A source's files as rows at random: published parquet, prepared shards, or TFDS sets."""

import os
import shlex
from typing import Any

import pyarrow as pa

from data_pipelines import manifest, pairs, parquet, records, tfds_source
from data_pipelines.image_files import check_root
from data_pipelines.kinds import KINDS
from data_pipelines.rejection import BadRow, Rejected
from data_pipelines.row_groups import RowGroups
from data_pipelines.source_config import SourceConfig
from idefics_jax.errors import UserError

# `group_rows`, `name(group, row)`, `row(group, row)`, and what `DocumentSource` tells of them.
Rows = parquet.ParquetRows | records.RecordRows | tfds_source.TfdsRows
# What the names of files end in that preparation reads and training cannot.
SEQUENTIAL = (".tar", ".jsonl", ".jsonl.gz")
# What a column of a prepared shard holds (training_form.py), as parquet would.
_STORED_AS = {"bytes": pa.binary(), "text": pa.string(), "number": pa.float64()}


def find_files(config: SourceConfig) -> list[str]:
    """Returns the paths of a source's files, unread; raises UserError where one, or its images' folder, is missing."""
    where = f"source {config.name!r}"
    check_root(config.image_root, where=f"{where}: image_root")
    return parquet.expand(config.paths, where=f"{where}: paths")


def open_rows(config: SourceConfig, row_groups: RowGroups) -> Rows:
    """Opens a source's files, whichever form they have.

    Raises:
      UserError: files are missing, of several forms, without rows, or have other columns than the kind's.
    """
    where, paths = f"source {config.name!r}", find_files(config)
    forms = {_form(path) for path in paths}
    if len(forms) > 1:
        mixed = " with ".join(form for form in _OPEN if form in forms)
        raise UserError(f"{where} mixes {mixed}; make a source of each")
    (form,) = forms
    if config.features and form != "TFDS shards":
        raise UserError(f"{where}: features are for TFDS sets, and its paths name {form}; take them out")
    rows = _OPEN[form](config, paths, row_groups)
    if not rows.group_rows.sum():
        raise UserError(f"{where}: {', '.join(config.paths)} hold no rows; name files that do")
    return rows


def _form(path: str) -> str:
    """Says what a path leads to, by its name."""
    if tfds_source.is_shard(path):
        return "TFDS shards"
    return "prepared shards" if path.endswith(manifest.SUFFIX) or os.path.isdir(path) else "other files"


def _open_tfds(config: SourceConfig, paths: list[str], _: RowGroups) -> tfds_source.TfdsRows:
    rows = tfds_source.TfdsRows(paths, config.kind, dict(config.features))
    _further_columns(config, dict.fromkeys(rows.fields, pa.string()), paths[0])
    return rows


def _open_parquet(config: SourceConfig, paths: list[str], row_groups: RowGroups) -> parquet.ParquetRows:
    for path in paths:
        if path.endswith(SEQUENTIAL):
            raise UserError(
                f"{path} of source {config.name!r} can only be read from end to end; prepare it (python -m "
                f"data_pipelines.prepare --kind {config.kind} --input {shlex.quote(path)} --output FOLDER) and name "
                "that folder"
            )
    footers = parquet.footers_or_faults(paths)
    columns = []
    for footer in footers:
        if footer.fault:
            continue
        needed = columns_of(footer, config.kind, where=f"{footer.path} of source {config.name!r}")
        there = {field.name: field.type for field in footer.schema}
        columns.append(list(dict.fromkeys(needed + _further_columns(config, there, footer.path))))
    if len({tuple(name for name in names if name != pairs.STATUS.name) for names in columns}) > 1:
        raise UserError(f"source {config.name!r} mixes files with different columns; make a source of each")
    return parquet.ParquetRows(footers, max(columns, key=len), kept=row_groups)


def _open_shards(config: SourceConfig, paths: list[str], _: RowGroups) -> records.RecordRows:
    manifests = manifest.load_all(paths)
    for found in manifests:
        if found.kind != config.kind:
            raise UserError(
                f"{found.path} of source {config.name!r} says kind {found.kind!r}, not {config.kind!r}: set kind to "
                f"{found.kind!r}"
            )
    common = set.intersection(*(set(found.columns) for found in manifests))
    columns = {name: form for name, form in manifests[0].columns.items() if name in common}
    there = {name: _STORED_AS[form] for name, form in columns.items() if isinstance(form, str)}
    _further_columns(config, there, manifests[0].path)
    return records.RecordRows([shard for found in manifests for shard in found.shards], columns)


def _further_columns(config: SourceConfig, there: dict[str, pa.DataType], path: Any) -> list[str]:
    """Returns the columns that captions and filters need; raises UserError if they are not there."""
    needed = pa.schema([*((column, pa.string()) for column, _ in config.captions), *config.filters.columns])
    for field in needed:
        if field.name not in there or not parquet.reads_as(there[field.name], field.type):
            what = "captions" if field.name in dict(config.captions) else "filters"
            raise UserError(
                f"{path} of source {config.name!r} has no column {field.name} {field.type}, which its {what} need; it "
                f"has {', '.join(f'{name} {kind}' for name, kind in there.items())}"
            )
    return needed.names


_OPEN = {"TFDS shards": _open_tfds, "prepared shards": _open_shards, "other files": _open_parquet}


def columns_of(footer: parquet.Footer, kind: str, *, where: str) -> list[str]:
    """Returns the columns to read of a parquet file of a kind; raises UserError if they are not there.

    Args:
      footer: of the file.
      kind: a name in KINDS.
      where: opens the message.
    """
    schema = footer.schema
    for needed in KINDS[kind].NEEDED:
        if _has(schema, needed):
            return needed.names
    others = [kind for kind, module in KINDS.items() if any(_has(schema, needed) for needed in module.NEEDED)]
    accepted = "; ".join(f"{kind}: {_show(module.SCHEMA)}" for kind, module in KINDS.items())
    raise UserError(
        f"{where} has the columns {_show(schema)}, which are not those of kind {kind!r}: "
        f"{f'set kind to {others[0]!r}' if others else f'convert it to one of {accepted}'}"
    )


def _has(schema: pa.Schema, needed: pa.Schema) -> bool:
    return all(
        field.name in schema.names and parquet.reads_as(schema.field(field.name).type, field.type) for field in needed
    )


def _show(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def read_row(config: SourceConfig, rows: Rows, group: int, row: int) -> dict[str, Any] | Rejected:
    """Reads a row's columns."""
    name = f"{config.name}/{rows.name(group, row)}"
    try:
        return rows.row(group, row)
    except UnicodeDecodeError:
        return Rejected(name, "not-utf8", "a text is not UTF-8; write it again")
    except parquet.DAMAGED as error:
        return Rejected(name, "damaged-parquet", f"its row group cannot be read ({error})")
    except BadRow as error:
        return Rejected(name, error.reason, str(error))
