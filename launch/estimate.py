"""From a compiled step to seconds and utilisation: what is estimated, and from what."""

import dataclasses
from collections.abc import Iterable

from launch.chips import CHIPS
from launch.collectives import Collective
from launch.program import Cost, Operation
from launch.slices import Slice

# What stands in an operation's name, and what it belongs to: the first that is found.
PARTS = {
    "vision_model/": "vision encoder",
    "modality_projection": "modality projection",
    "perceiver_resampler": "resampler",
    "logits": "head",
    "text_model/": "decoder",
}
REST = "loss, optimizer and the rest"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step of a program on a slice.

    Attributes:
      compute, kernels, collectives: seconds of the compiler's cycles, of our kernels, and of the collectives that
        nothing hides.
      needed: operations that the algorithm needs, over all chips.
      done: operations that the program does: recomputation, padding and masked pairs included.
      chips: how many of them.
      peak: of one.
    """

    compute: float
    kernels: float
    collectives: float
    needed: float
    done: float
    chips: int
    peak: float

    @property
    def seconds(self) -> float:
        return self.compute + self.kernels + self.collectives

    @property
    def mfu(self) -> float:
        """Share of the chips' peak that goes into what the algorithm needs."""
        return self.needed / (self.seconds * self.chips * self.peak)

    @property
    def hfu(self) -> float:
        """Share of the chips' peak that is in use."""
        return self.done / (self.seconds * self.chips * self.peak)


def by_part(operations: Iterable[Operation]) -> dict[tuple[str, str], tuple[int, int]]:
    """Sums cycles of products and of all else by part of the model and pass over it.

    Returns:
      {(part, "forward", "recomputed" or "backward"): (cycles of products, cycles of all else)}, the most first.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for one in operations:
        part = next((part for word, part in PARTS.items() if word in one.name), REST)
        recomputed, backward = "rematted_computation" in one.name, "transpose(" in one.name
        way = "recomputed" if recomputed else "backward" if backward else "forward"
        found.setdefault((part, way), [0, 0])[0 if one.product else 1] += one.cycles
    return {key: tuple(cycles) for key, cycles in sorted(found.items(), key=lambda item: -sum(item[1]))}


def exposed_seconds(cost: Cost, where: Slice) -> float:
    """Returns the time in which collectives run, one after the other, and nothing computes."""
    clock = CHIPS[where.generation].clock
    return sum(one.count * max(collective_seconds(one, where) - one.beside / clock, 0) for one in cost.collectives)


def hidden_seconds(cost: Cost, where: Slice) -> float:
    """Returns the time in which collectives run beside computation."""
    return sum(one.count * collective_seconds(one, where) for one in cost.collectives) - exposed_seconds(cost, where)


def collective_seconds(one: Collective, where: Slice) -> float:
    """Returns how long a collective takes if nothing but the links' bandwidth holds it up.

    Among more chips than a slice has it goes over the data centre's network. Otherwise along as many axes of the torus
    as its group needs, on all links at once.
    """
    chip = CHIPS[where.generation]
    if one.devices > where.chips or (where.count > 1 and one.devices == where.count):
        bandwidth = chip.network_bandwidth
    else:
        bandwidth = ring_bandwidth(one.devices, where)
    share = (one.devices - 1) / one.devices
    sent = {
        "all-gather": one.bytes * share,
        "reduce-scatter": one.bytes * (one.devices - 1),
        "all-reduce": 2 * one.bytes * share,
        "all-to-all": one.bytes * share / 4,
        "collective-permute": one.bytes,
    }[one.kind]
    return sent / bandwidth


def ring_bandwidth(devices: int, where: Slice) -> float:
    """Returns the bytes a second that each chip of a group sends: both ways along each axis whose ends are linked."""
    chip, links, reached = CHIPS[where.generation], 0, 1
    for side in sorted(where.dimensions, reverse=True):
        if reached >= devices:
            break
        reached *= side
        links += 2 if side >= chip.ring and side % chip.ring == 0 else 1 if side > 1 else 0
    return chip.link_bandwidth * max(links, 1)


def roofline_seconds(bytes_read: float, flops: float, where: Slice) -> float:
    """Returns the least time in which a slice reads so many bytes of memory and does so many operations."""
    chip = CHIPS[where.generation]
    chips = where.chips * where.count
    return max(bytes_read / (chip.hbm_bandwidth * chips), flops / (chip.peak * chips))


def gib(count: float) -> float:
    return count / 2**30
