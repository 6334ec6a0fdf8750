"""Memory is lent again when nobody looks at it, and never before."""

import numpy as np

from data_pipelines.lent_memory import LentMemory


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_comes_back_with_the_last_view_of_it():
    memory = LentMemory((3, 4))
    first = memory.lend()
    first[:] = 7
    where, view = address(first), first[1:, ::2].reshape(-1)[2:].view(np.int8)
    del first
    second = memory.lend()
    assert second.shape == (3, 4)
    second[:] = 1
    assert (view == 7).all()
    del view
    assert address(memory.lend()) == where


def test_no_more_is_kept_than_was_looked_at_at_once():
    memory = LentMemory((1000,))
    where = set()
    for _ in range(5):
        held = [memory.lend(), memory.lend()]
        where |= {address(array) for array in held}
        del held
    assert len(where) == 2
