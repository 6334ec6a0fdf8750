"""The threshold that drops a share of documents: a quantile of a column of scores, over parquet files.

    python -m data_pipelines.quantile --input 'obelics/*.parquet' --column perplexity --quantile 0.95

prints what to give the filter document_max_perplexity, so that it drops the 5 % of documents with the highest score.
All scores are in memory at once: 8 bytes a document.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from absl import flags

from data_pipelines import parquet
from idefics_jax import commands
from idefics_jax.errors import UserError


def quantile(paths: Sequence[str], column: str, share: float) -> tuple[float, int, int]:
    """Returns the least score that at least a share of the documents do not exceed.

    Args:
      paths: parquet files with the column.
      column: of numbers; nulls and NaN are not counted, as the filter drops them whatever the threshold.
      share: in (0, 1].

    Returns:
      The score, how many there are, and how many documents have none.

    Raises:
      UserError: a file lacks the column, or there is no score.
    """
    scores = []
    for footer in parquet.read_footers(paths):
        names = footer.schema.names
        if column not in names or not parquet.reads_as(footer.schema.field(column).type, pa.float64()):
            raise UserError(f"{footer.path} has no column {column} of numbers; it has {', '.join(names)}")
        with parquet.open_file(footer.path) as file:
            scores.append(file.read(columns=[column]).column(column).to_numpy().astype(np.float64))
    every = np.concatenate(scores)
    known = every[~np.isnan(every)]
    if not len(known):
        raise UserError(f"column {column} holds no score in {', '.join(paths[:3])}; name files that are scored")
    return float(np.quantile(known, share, method="inverted_cdf")), len(known), len(every) - len(known)


def main() -> None:
    paths = parquet.expand(_INPUT.value, where="--input")
    score, known, unknown = quantile(paths, _COLUMN.value, _QUANTILE.value)
    print(f"{score!r}  ({_QUANTILE.value:g} of {known} documents are not above it; {unknown} have no {_COLUMN.value})")


if __name__ == "__main__":
    _INPUT = flags.DEFINE_multi_string("input", None, "parquet files, a path or glob; may be repeated")
    _COLUMN = flags.DEFINE_string("column", "perplexity", "the column of scores")
    _QUANTILE = flags.DEFINE_float("quantile", 0.95, "share of the documents to keep", lower_bound=0, upper_bound=1)
    commands.run(main, required=("input",))
