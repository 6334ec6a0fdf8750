"""How every benchmark reports: a table to read and, with `--json FILE`, its numbers as flat `name: number` JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from idefics_jax.errors import UserError

_JSON = flags.DEFINE_string("json", None, "file to write the numbers to, as flat JSON")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows under headings; floats with three decimals, everything but the first column to the right."""
    cells = [list(headings)] + [
        [f"{cell:,.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        aligned = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *aligned[1:]]).rstrip(), flush=True)


def write_json(numbers: Mapping[str, float]) -> None:
    """Writes the numbers to the file of `--json`, whole or not at all, if it was given; raises UserError."""
    if _JSON.value is None:
        return
    aside = Path(f"{_JSON.value}.tmp")
    try:
        aside.write_text(json.dumps({name: float(number) for name, number in numbers.items()}, indent=2) + "\n")
        os.replace(aside, _JSON.value)
    except OSError as error:
        raise UserError(
            f"--json: {_JSON.value} cannot be written ({error.strerror}); name a file in a folder"
        ) from error
