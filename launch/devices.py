"""The devices that a training started here would have, all its processes together.

They are counted in a process of its own: a TPU serves one at a time, and who only starts trainings must leave it free.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from idefics_jax import processes, sharding
from idefics_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Devices:
    """How many there are, and in how many slices they lie."""

    count: int
    slices: int

    def mesh(self, sizes: Mapping[str, int]) -> AbstractMesh:
        """Returns the mesh that `sharding.make_mesh` makes of them, without them; raises UserError as it does."""
        shape = sharding.mesh_shape(sizes, self.count, self.slices)
        return AbstractMesh(tuple(shape), sharding.MESH_AXES)


def found() -> Devices:
    """Returns what JAX finds here.

    Raises:
      UserError: it finds no devices, or the processes of the run do not find each other.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "devices.json")
        done = subprocess.run([sys.executable, "-m", "launch.devices", str(file)], check=False)
        if done.returncode:
            raise UserError("the devices could not be counted; mend what is said above and run the same command again")
        return Devices(**json.loads(file.read_text()))


def main() -> None:
    with processes.joined():
        slices = {getattr(device, "slice_index", 0) for device in jax.devices()}
        Path(sys.argv[1]).write_text(json.dumps({"count": jax.device_count(), "slices": len(slices)}))


if __name__ == "__main__":
    main()
