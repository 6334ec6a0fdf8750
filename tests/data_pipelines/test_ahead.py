"""Batches made ahead: as many as asked for, in order, and never one more."""

import subprocess
import sys
import threading
import time

import grain
import pytest

from data_pipelines.ahead import AheadIterDataset


class Numbers(grain.IterDataset):
    """Counts up to a last number, and tells how many were made."""

    def __init__(self, last):
        super().__init__()
        self.last, self.made = last, 0

    def __iter__(self):
        return NumbersIterator(self)


class NumbersIterator(grain.DatasetIterator):
    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.reached = numbers, 0

    def __next__(self):
        if self.reached == self.numbers.last:
            raise ValueError(f"there is nothing after {self.reached}")
        self.reached += 1
        self.numbers.made += 1
        return self.reached

    def get_state(self):
        return {"reached": self.reached}

    def set_state(self, state):
        self.reached = state["reached"]


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_are_made_than_one_in_use_and_those_ahead(count):
    numbers = Numbers(last=100)
    data = iter(AheadIterDataset(numbers, count=count))
    assert [next(data) for _ in range(4)] == [1, 2, 3, 4]
    while numbers.made < 4 + count:
        time.sleep(0.001)
    time.sleep(0.02)  # in which one too many would have been made
    assert numbers.made == 4 + count


def test_the_state_is_that_of_the_last_one_taken():
    data = iter(AheadIterDataset(Numbers(last=100), count=3))
    assert data.get_state() == {"reached": 0}
    assert [next(data) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert data.get_state() == {"reached": 5}
    data.set_state({"reached": 2})
    assert data.get_state() == {"reached": 2}
    assert [next(data), next(data)] == [3, 4]


def test_what_stops_the_thread_is_raised_where_it_was_to_be_taken():
    data = iter(AheadIterDataset(Numbers(last=2), count=3))
    assert [next(data), next(data)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing after 2"):
            next(data)
    data.set_state({"reached": 0})
    assert next(data) == 1


def test_closing_ends_the_thread_and_may_be_repeated():
    before = threading.active_count()
    data = iter(AheadIterDataset(Numbers(last=100), count=2))
    next(data)
    assert threading.active_count() == before + 1
    data.close()
    data.close()
    assert threading.active_count() == before


def test_a_process_ends_in_silence_with_batches_under_way():
    lines = (
        "from data_pipelines.ahead import AheadIterDataset",
        "from tests.data_pipelines.test_ahead import Numbers",
        "data = iter(AheadIterDataset(Numbers(last=100), count=2))",
        "print(next(data))",
    )
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("1\n", "")
