"""The TPU slices that programs are compiled for and runs are started on: what they are called, and what is in them.

A slice is rented by one name (v5e-256), asked of the Cloud TPU API by another (v5litepod-256), and found in GKE by two
labels of its nodes (tpu-v5-lite-podslice, 16x16). v4 and v5p count TensorCores in their names, two a chip; v5e counts
chips. Sources: Google's pages of each generation (cloud.google.com/tpu/docs/{v4,v5e,v5p}) and its plan of TPUs in GKE
(cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus).
"""

import dataclasses
import math
import re

from idefics_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Generation:
    """What all slices of one generation share.

    Attributes:
      accelerator_type: the Cloud TPU API's name of a slice, before the number.
      cores_per_chip: TensorCores, which that number counts.
      gke_accelerator: value of the node label cloud.google.com/gke-tpu-accelerator.
      machine_type: of a GKE node, before the number of its chips.
    """

    accelerator_type: str
    cores_per_chip: int
    gke_accelerator: str
    machine_type: str


GENERATIONS = {
    "v4": Generation("v4", 2, "tpu-v4-podslice", "ct4p-hightpu"),
    "v5e": Generation("v5litepod", 1, "tpu-v5-lite-podslice", "ct5lp-hightpu"),
    "v5p": Generation("v5p", 2, "tpu-v5p-slice", "ct5p-hightpu"),
}

# The most cubic shape of each size: the one that a name alone gets.
_TORUS_3D = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"}
_TORUS_2D = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice, or several alike that train together over the data centre's network.

    Attributes:
      generation: v4, v5e or v5p.
      size: the number in its name.
      topology: how its chips are arranged, AxB or AxBxC; value of the node label cloud.google.com/gke-tpu-topology.
      chips_per_host: chips of one virtual machine.
      count: how many slices.
    """

    generation: str
    size: int
    topology: str
    chips_per_host: int
    count: int

    @property
    def name(self) -> str:
        """As it is given to `find`."""
        return f"{self.count}x{self.generation}-{self.size}" if self.count > 1 else f"{self.generation}-{self.size}"

    @property
    def accelerator_type(self) -> str:
        """The Cloud TPU API's name of one slice."""
        return f"{GENERATIONS[self.generation].accelerator_type}-{self.size}"

    @property
    def gke_accelerator(self) -> str:
        """Value of the GKE node label cloud.google.com/gke-tpu-accelerator."""
        return GENERATIONS[self.generation].gke_accelerator

    @property
    def machine_type(self) -> str:
        """Of its GKE nodes."""
        return f"{GENERATIONS[self.generation].machine_type}-{self.chips_per_host}t"

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The topology as numbers."""
        return tuple(int(side) for side in self.topology.split("x"))

    @property
    def chips(self) -> int:
        """Chips of one slice, each one JAX device."""
        return math.prod(self.dimensions)

    @property
    def hosts(self) -> int:
        """Virtual machines of one slice, each one process of a run."""
        return self.chips // self.chips_per_host


def _slices() -> dict[str, Slice]:
    """Returns every slice offered, by its name."""
    found = [Slice(kind, size, shape, 4, 1) for kind in ("v4", "v5p") for size, shape in _TORUS_3D.items()]
    # Eight chips of v5e are one machine; more of them come in machines of four.
    found += [Slice("v5e", size, shape, 8 if size == 8 else 4, 1) for size, shape in _TORUS_2D.items()]
    return {one.name: one for one in found}


SLICES = _slices()


def find(name: str) -> Slice:
    """Returns the slice of a name, or several of it: v5p-128, 2xv5e-256.

    Raises:
      UserError: no such slice is offered.
    """
    read = re.fullmatch(r"(?:([1-9]\d*)x)?(.*)", name)
    if read is None or read[2] not in SLICES:
        raise UserError(f"slice {name!r} is unknown; choose one of {', '.join(SLICES)}, or several as in 2xv5e-256")
    return dataclasses.replace(SLICES[read[2]], count=int(read[1] or 1))
