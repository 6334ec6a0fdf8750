"""Compiles for TPU slices on a machine without one: what a program costs, as the TPU's own compiler sees it.

libtpu compiles for a slice that is only described. From the compiled program come the memory it takes, and the cycles
the compiler expects each operation to take, which are summed here with the trip counts of loops. They are estimates: of
a published 7B step they are off by 5 to 10 per cent, and attention kernels of our own would not be in them.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax

from idefics_jax.errors import UserError

# Several processes may compile at once, and none looks for a TPU's metadata server.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}

# A slice's name as it is rented -> how libtpu calls it. A v4 chip's two cores count as one device under megacore.
SLICES: dict[str, dict[str, Any]] = {
    "v4-8": {"topology_name": "v4:2x2x1", "chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)},
    "v5e-8": {"topology_name": "v5e:2x4", "chips_per_host_bounds": (2, 4, 1)},
    "v5p-8": {"topology_name": "v5:2x2x1"},
}


def slice_devices(name: str) -> list[Any]:
    """Returns the devices of a slice, to build a mesh of (sharding.make_mesh); they compile, they do not run.

    Raises:
      UserError: an unknown slice, or libtpu is not installed.
    """
    if name not in SLICES:
        raise UserError(f"slice {name!r} is unknown; choose one of {', '.join(SLICES)}")
    for variable, value in _ENVIRONMENT.items():
        # Where there is no TPU, JAX leaves a warning in the place of what libtpu reads.
        if os.environ.get(variable, "WARNING").startswith("WARNING"):
            os.environ[variable] = value
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", **SLICES[name]).devices)
    except RuntimeError as error:
        raise UserError(f"no program can be compiled for {name} ({error}); install requirements-test.txt") from error


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled program takes on each device.

    Attributes:
      cycles: estimated, loops multiplied out.
      argument_bytes: of its arguments, as they lie in memory.
      peak_bytes: the most memory in use, arguments included.
    """

    cycles: int
    argument_bytes: int
    peak_bytes: int


def cost(fn: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Cost:
    """Compiles `fn` for the devices that its arguments' shardings name.

    Args:
      fn: the function.
      *arguments: trees of ShapeDtypeStructs with shardings.
      donate: positions of the arguments whose memory it may take over.

    Raises:
      UserError: the program does not fit the devices' memory.
    """
    try:
        compiled = jax.jit(fn, donate_argnums=donate).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = re.search(r"Ran out of memory[^.]*\.[^.]*\.", str(error))
        raise UserError(f"it does not fit: {said[0] if said else error}") from error
    memory = compiled.memory_analysis()
    return Cost(estimated_cycles(compiled.as_text()), memory.argument_size_in_bytes, memory.peak_memory_in_bytes)


def estimated_cycles(program: str) -> int:
    """Sums the estimated cycles of a compiled program's text, the body of a loop as often as it runs."""
    computations, entry = _computations(program)

    @functools.cache
    def total(name: str) -> int:
        cycles = 0
        for line in computations[name]:
            own = re.search(r'"estimated_cycles":"(\d+)"', line)
            cycles += int(own[1]) if own else 0
            loop = re.search(r"\bwhile\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            cycles += _trips(line, computations[loop[1]]) * total(loop[2]) if loop else 0
            called = re.search(r"\bcall\(.*to_apply=%?([\w.\-]+)", line)
            cycles += total(called[1]) if called else 0
            branches = re.search(r"\bconditional\(.*branch_computations=\{([^}]*)\}", line)
            if branches:
                cycles += max(total(branch.strip().lstrip("%")) for branch in branches[1].split(","))
        return cycles

    return total(entry)


def _trips(line: str, condition: list[str]) -> int:
    """Returns how often a loop runs: as it is noted, or, as JAX's scans count from 0, the bound of its condition."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
    bounds = [int(number) for text in condition for number in re.findall(r"\bs32\[\]\S* constant\((\d+)\)", text)]
    if not noted and len(bounds) != 1:
        raise ValueError(f"the number of trips of a loop cannot be told from its condition: {condition}")
    return int(noted[1]) if noted else bounds[0]


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation by its name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in program.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opened:
            name = opened[2]
            computations[name] = []
            entry = name if opened[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry
