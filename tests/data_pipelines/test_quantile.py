import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.filters import Filters, apply
from data_pipelines.quantile import quantile
from data_pipelines.rejection import BadRow
from idefics_jax.errors import UserError


def write(path, scores, name="perplexity") -> str:
    pq.write_table(pa.table({name: scores}), path)
    return str(path)


def is_dropped(score: float, most: float) -> bool:
    try:
        page = {"images": [None], "texts": ["words"], "perplexity": score}
        apply(Filters(document_max_perplexity=most), page, "obelics")
    except BadRow:
        return True
    return False


def test_the_threshold_drops_the_share_with_the_highest_scores_over_all_files(tmp_path):
    low, high = [float(score) for score in range(100)], [float(score) for score in range(100, 200)]
    paths = [write(tmp_path / "0.parquet", pa.array(high)), write(tmp_path / "1.parquet", pa.array(low))]
    threshold, known, unknown = quantile(paths, "perplexity", 0.95)
    assert [score for score in low + high if is_dropped(score, threshold)] == high[-10:]
    assert (known, unknown) == (200, 0)


def test_documents_without_a_score_do_not_move_it(tmp_path):
    path = write(tmp_path / "0.parquet", pa.array([1.0, None, 2.0, float("nan"), 3.0], pa.float32()))
    assert quantile([path], "perplexity", 0.5) == (2.0, 3, 2)


def test_files_without_scores_are_refused(tmp_path):
    other = write(tmp_path / "other.parquet", pa.array(["a"]))
    empty = write(tmp_path / "empty.parquet", pa.array([None, None], pa.float64()))
    with pytest.raises(UserError, match="other.parquet has no column perplexity of numbers; it has perplexity"):
        quantile([other], "perplexity", 0.5)
    with pytest.raises(UserError, match="holds no score"):
        quantile([empty], "perplexity", 0.5)
