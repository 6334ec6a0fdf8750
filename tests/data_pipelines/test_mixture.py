import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from data_pipelines.mixture import Mixture

WEIGHTS = {"obelics": 0.45, "pairs": 0.35, "pdf": 0.2}


def take(mixture: Mixture, count: int) -> list[tuple[str, int]]:
    return [mixture(index) for index in range(count)]


@hypothesis.given(
    stages=st.lists(
        st.tuples(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.05, 9), min_size=1), st.integers(1, 700)),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 3),
)
@hypothesis.settings(deadline=None, max_examples=40)
def test_a_source_goes_on_from_stage_to_stage_without_gap_or_repeat(stages, seed):
    last, _ = stages[-1]
    mixture = Mixture([*stages[:-1], (last, None)], start={}, first=(), seed=(seed,))
    reached = collections.Counter()
    for index in range(sum(length for _, length in stages) + 500):
        assert mixture.positions(index) == {name: reached[name] for name in mixture.names}
        name, position = mixture(index)
        assert position == reached[name]
        reached[name] += 1


def test_shares_are_the_weights_and_lie_evenly():
    mixture = Mixture([(WEIGHTS, None)], start={}, first=(), seed=(0,))
    names = np.array([name for name, _ in take(mixture, 20_000)])
    for name, share in WEIGHTS.items():
        assert np.mean(names == name) == pytest.approx(share, abs=1e-4)
        windows = (names == name).reshape(-1, 100).mean(1)
        assert np.abs(windows - share).max() < 0.08


def test_a_rare_source_gets_its_share():
    weights = {"common": 1.0, "rare": 1 / 3000}
    names = collections.Counter(
        name for name, _ in take(Mixture([(weights, None)], start={}, first=(), seed=(0,)), 90_000)
    )
    assert names["rare"] == pytest.approx(30, abs=1)


def test_the_last_stage_has_weights_of_its_own():
    mixture = Mixture([({"a": 1.0}, 50), ({"a": 1.0, "b": 1.0}, None)], start={}, first=(), seed=(0,))
    drawn = take(mixture, 4050)
    assert drawn[:50] == [("a", position) for position in range(50)]
    assert [position for name, position in drawn[50:] if name == "a"][:3] == [50, 51, 52]
    assert sum(name == "b" for name, _ in drawn) == pytest.approx(2000, abs=2)


def test_a_source_may_begin_where_another_run_left_it():
    mixture = Mixture(
        [({"a": 1.0, "b": 1.0}, None)], start={"b": 70}, first=[("b", 7), ("gone", 3), ("a", 9)], seed=(0,)
    )
    assert take(mixture, 2) == [("b", 7), ("a", 9)]
    assert (mixture.leads, mixture.set_aside) == (2, [("gone", 3)])
    assert mixture.positions(0) == mixture.positions(2) == {"a": 0, "b": 70}
    assert dict(reversed(take(mixture, 102)[2:])) == {"a": 0, "b": 70}


def test_seeds_give_other_orders_with_the_same_shares():
    orders = [
        [name for name, _ in take(Mixture([(WEIGHTS, None)], start={}, first=(), seed=(0, shard)), 256)]
        for shard in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert collections.Counter(orders[0]) == collections.Counter(orders[1])
