"""Batches made ahead of their use, in a thread of its own, with no more of them alive than is asked for.

Grain's own prefetch begins another element while as many as its buffer holds wait to be taken. Here what is under way
counts as made: with one ahead, a process holds the batch that it trains on and one more. Where a batch is hundreds of
MiB, that is the difference between two of them and three.
"""

import collections
import concurrent.futures
import copy
from typing import Any

import grain


class AheadIterDataset(grain.IterDataset):
    """Gives the elements of another, made ahead; the states are the same."""

    def __init__(self, parent: grain.IterDataset, *, count: int):
        """`count` is how many are made ahead, what is under way included; at least 1."""
        super().__init__(parent)
        self._count = count

    def __iter__(self) -> grain.DatasetIterator:
        return _AheadIterator(iter(self._parent), self._count)


class _AheadIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, count: int):
        super().__init__(parent)
        self._count = count
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._made: collections.deque[concurrent.futures.Future] = collections.deque()
        self._state = parent.get_state()

    def __next__(self) -> Any:
        self._begin()
        try:
            element, self._state = self._made.popleft().result()
        except Exception:
            self._stop()
            raise
        self._begin()
        return element

    def get_state(self) -> dict[str, Any]:
        """Returns the state after the last element that was taken."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._parent.set_state(state)
        self._state = self._parent.get_state()

    def close(self) -> None:
        """Ends the thread, once it is done with what is under way."""
        self._stop()
        self._thread.shutdown()
        super().close()

    def __del__(self):
        # Whichever thread lets go of it last does not wait: it may be its own.
        for future in self._made:
            future.cancel()
        self._thread.shutdown(wait=False)

    def _begin(self) -> None:
        while len(self._made) < self._count:
            self._made.append(self._thread.submit(_make, self._parent))

    def _stop(self) -> None:
        """Throws away what was made ahead, so that no thread is at the parent."""
        concurrent.futures.wait([future for future in self._made if not future.cancel()])
        self._made.clear()


def _make(parent: grain.DatasetIterator) -> tuple[Any, dict[str, Any]]:
    element = next(parent)
    return element, copy.deepcopy(parent.get_state())
