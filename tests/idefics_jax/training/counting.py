"""An iterator to save beside a state."""

import grain


class Counting(grain.DatasetIterator):
    """0, 1, 2, ... with a state of the data pipeline's form, of one shard."""

    def __init__(self):
        super().__init__()
        self._next = 0

    def __next__(self) -> int:
        self._next += 1
        return self._next - 1

    def get_state(self) -> dict:
        return {"about": "{}", "shards": {"0": {"next": self._next}}}

    def set_state(self, state: dict) -> None:
        self._next = state["shards"]["0"]["next"]
