import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from data_pipelines.order import EpochOrder


@hypothesis.given(
    group_rows=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda rows: sum(rows) > 0),
    window=st.integers(1, 5),
    seed=st.integers(0, 5),
    data=st.data(),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_an_epoch_of_all_shares_reads_every_row_once(group_rows, window, seed, data):
    total = sum(group_rows)
    shards = data.draw(st.integers(1, min(total, 4)))
    seen = []
    order = EpochOrder(np.array(group_rows), window=window, seed=seed, shards=shards)
    for shard in range(shards):
        length = order.length(shard)
        seen += [order(shard, length + i) for i in range(length)]  # the second epoch
    assert sorted(seen) == [(1, group, row) for group, rows in enumerate(group_rows) for row in range(rows)]


def test_order_is_a_function_of_seed_and_epoch():
    def make(seed):
        order = EpochOrder(np.array([50, 50]), window=2, seed=seed, shards=1)
        return lambda index: order(0, index)[1:]

    first = [make(0)(i) for i in range(100)]
    assert [make(0)(i) for i in reversed(range(100))] == first[::-1]
    assert [make(1)(i) for i in range(100)] != first
    assert [make(0)(100 + i) for i in range(100)] != first


def test_a_share_reads_its_row_groups_window_by_window():
    order = EpochOrder(np.full(40, 25), window=4, seed=0, shards=2)
    groups = [order(1, i)[1] for i in range(500)]
    assert len(set(groups)) == 20
    for start in range(0, 500, 100):
        assert len(set(groups[start : start + 100])) == 4


def test_more_shares_than_rows_is_refused():
    with pytest.raises(ValueError, match="3 rows cannot be shared by 4 shards"):
        EpochOrder(np.array([3]), window=1, seed=0, shards=4)
