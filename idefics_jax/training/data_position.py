"""The data's position in a checkpoint: a file for each virtual shard, so that any number of processes can take it up.

data/about.json      what the sequence of batches depends on
data/shard_<k>.json  where shard k stands
"""

import dataclasses

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from data_pipelines import position


class DataPositionHandler(ocp.CheckpointHandler):
    """Saves and restores the iterator that data_pipelines.pipeline.batches returns."""

    def save(self, directory: epath.Path, args: "SavePosition") -> None:
        """Writes the shards that this process holds."""
        position.write(directory, args.item, first_process=jax.process_index() == 0)

    def restore(self, directory: epath.Path, args: "RestorePosition") -> grain.DatasetIterator:
        """Sets the position of the iterator, whichever of the shards it holds."""
        position.restore(directory, args.item)
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
