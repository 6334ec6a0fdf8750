"""The data's position in a checkpoint: a file for each virtual shard, so that any number of processes can take it up.

data/about.json      what the sequence of batches depends on
data/shard_<k>.json  where shard k stands
"""

import dataclasses
import json
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath


class DataPositionHandler(ocp.CheckpointHandler):
    """Saves and restores the iterator that data_pipelines.pipeline.batches returns."""

    def save(self, directory: epath.Path, args: "SavePosition") -> None:
        """Writes the shards that this process holds."""
        write_position(directory, args.item)

    def restore(self, directory: epath.Path, args: "RestorePosition") -> grain.DatasetIterator:
        """Sets the position of the iterator, whichever of the shards it holds."""
        files = {shard: directory / f"shard_{shard}.json" for shard in args.item.get_state()["shards"]}
        # With another number of shards some are not there; what they depend on is compared before they are looked at.
        saved = {shard: json.loads(file.read_text()) for shard, file in files.items() if file.exists()}
        args.item.set_state({"about": (directory / "about.json").read_text(), "shards": saved})
        return args.item

    def metadata(self, directory: epath.Path) -> None:
        """Returns nothing: the files say all there is."""
        del directory


@ocp.args.register_with_handler(DataPositionHandler, for_save=True)
@dataclasses.dataclass
class SavePosition(ocp.args.CheckpointArgs):
    """Asks for an iterator's position to be saved."""

    item: grain.DatasetIterator


@ocp.args.register_with_handler(DataPositionHandler, for_restore=True)
@dataclasses.dataclass
class RestorePosition(ocp.args.CheckpointArgs):
    """Asks for an iterator's position to be restored."""

    item: grain.DatasetIterator


def write_position(directory: epath.Path, data: grain.DatasetIterator) -> None:
    """Writes where the shards of this process stand; the first process also writes what they depend on."""
    state: dict[str, Any] = data.get_state()
    for shard, own in state["shards"].items():
        (directory / f"shard_{shard}.json").write_text(json.dumps(own, indent=1))
    if jax.process_index() == 0:
        (directory / "about.json").write_text(state["about"])
