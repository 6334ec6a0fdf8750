"""A program that the TPU's compiler has made, read: memory, cycles, collectives and kernels on each device.

libtpu compiles for a slice that is only described. In the text of the compiled program stand the cycles the compiler
expects each operation to take, summed here with the trip counts of loops. It expects nothing of two kinds of operation,
which are therefore listed apart: collectives, and kernels of our own (Pallas).
"""

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from idefics_jax.errors import UserError
from launch import slices
from launch.chips import CHIPS
from launch.collectives import FUSED, Collective, collectives_of

# Several processes may compile at once, and none looks for a TPU's metadata server.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
# How libtpu calls the generations. A v4 chip's two cores count as one device under megacore, as on v5p by default.
_LIBTPU = {
    "v4": {"prefix": "v4", "chip_config_name": "megacore"},
    "v5e": {"prefix": "v5e"},
    "v5p": {"prefix": "v5"},
}
_HOST_BOUNDS = {4: (2, 2, 1), 8: (2, 4, 1)}


def wraps(one: slices.Slice) -> tuple[bool, bool, bool]:
    """Returns along which axes of a slice the last chip is linked to the first; the compiler asks for three."""
    linked = [side % CHIPS[one.generation].ring == 0 for side in one.dimensions]
    return tuple(linked + [False] * (3 - len(linked)))


def slice_devices(name: str) -> list[Any]:
    """Returns the devices of a slice, to build a mesh of (sharding.make_mesh); they compile, they do not run.

    Raises:
      UserError: an unknown slice, or libtpu is not installed.
    """
    wanted = slices.find(name)
    names = _LIBTPU[wanted.generation]
    chosen = {key: value for key, value in names.items() if key != "prefix"}
    for variable, value in _ENVIRONMENT.items():
        # Where there is no TPU, JAX leaves a warning in the place of what libtpu reads.
        if os.environ.get(variable, "WARNING").startswith("WARNING"):
            os.environ[variable] = value
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{names['prefix']}:{wanted.topology}",
            chips_per_host_bounds=_HOST_BOUNDS[wanted.chips_per_host],
            num_slices=wanted.count,
            wrap=wraps(wanted),
            **chosen,
        )
    except RuntimeError as error:
        raise UserError(f"no program can be compiled for {name} ({error}); install requirements-test.txt") from error
    return list(described.devices)


class DoesNotFit(UserError):
    """A program takes more memory than a device has.

    Attributes:
      bytes_wanted: as much as the compiler says it takes, or None where it does not.
    """

    def __init__(self, said: str):
        super().__init__(f"it does not fit: {said}")
        found = re.search(r"(?:Used|requirement?s? \(|temporaries \()\s*([\d.]+)([KMGT])", said)
        self.bytes_wanted = float(found[1]) * 1024 ** " KMGT".index(found[2]) if found else None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Calls of a Pallas kernel in a program.

    Attributes:
      name: as it was given to pallas_call.
      shape: of its first result on a device.
      count: how often it is called, loops multiplied out.
    """

    name: str
    shape: tuple[int, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """Operations of one name in a program.

    Attributes:
      name: where they come from, as JAX writes it: jit(step)/jvp(Idefics2)/text_model/.../dot_general.
      product: whether they are products of matrices, with what is fused to them.
      cycles: estimated of all of them, loops multiplied out.
    """

    name: str
    product: bool
    cycles: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled program takes on each device.

    Attributes:
      operations: with the cycles that the compiler expects of them.
      argument_bytes: of its arguments, as they lie in memory.
      peak_bytes: the most memory in use, arguments included.
      collectives: what passes between devices.
      kernels: calls of our own kernels.
    """

    operations: tuple[Operation, ...]
    argument_bytes: int
    peak_bytes: int
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]

    @property
    def cycles(self) -> int:
        """Estimated for the whole, our kernels and collectives left out."""
        return sum(one.cycles for one in self.operations)


def cost(fn: Callable, *arguments: Any, donate: tuple[int, ...] = (), out_shardings: Any = None) -> Cost:
    """Compiles `fn` for the devices that its arguments' shardings name.

    Args:
      fn: the function.
      *arguments: trees of ShapeDtypeStructs with shardings.
      donate: positions of the arguments whose memory it may take over.
      out_shardings: of the results, None where the compiler may choose.

    Raises:
      DoesNotFit: the program takes more memory than the devices have.
    """
    lowered = jax.jit(fn, donate_argnums=donate, out_shardings=out_shardings).lower(*arguments)
    return compiled_cost(lowered, {})


def compiled_cost(lowered: jax.stages.Lowered, options: dict[str, str]) -> Cost:
    """Compiles a lowered program with the compiler's options given; see `cost`."""
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = re.search(r"Ran out of memory[^.]*\.[^.]*\.[^.]*\.", str(error))
        raise DoesNotFit(said[0] if said else str(error)) from error
    memory, text = compiled.memory_analysis(), compiled.as_text()
    read = Text(text)
    return Cost(
        operations=read.operations(),
        argument_bytes=memory.argument_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        collectives=read.collectives(),
        kernels=read.kernels(),
    )


def dumped(folder: Path, module: str) -> tuple[int, tuple[Collective, ...]] | None:
    """Reads what the compiler has written of a program so far (xla_dump_to): peak bytes and collectives, or None.

    They are known long before code is made of the program, and only with that come cycles.

    Args:
      folder: that it writes to.
      module: name of the program, jit_NAME.
    """
    reports = list(folder.glob(f"*{module}.*after_optimizations-memory-usage-report.txt"))
    texts = list(folder.glob(f"*{module}.*after_optimizations_after_buffer_assignment.txt"))
    if not reports or not texts:
        return None
    total = re.search(r"Memory Space: default.*\nTotal bytes: (\d+)", reports[0].read_text())
    text = texts[0].read_text()
    return (int(total[1]), Text(text).collectives()) if total and text.rstrip().endswith("}") else None


class Text:
    """The text of a compiled program, its computations apart and its loops' trips counted."""

    def __init__(self, program: str):
        self._lines, self._entry = _computations(program)
        self._runs = self._count_runs()

    def operations(self) -> tuple[Operation, ...]:
        """Returns what the compiler expects cycles of; a fusion's stand where it is called, not in what it fuses."""
        found: collections.Counter = collections.Counter()
        for name, runs in self._runs.items():
            for line in self._lines[name] if name not in self._fused else ():
                if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                    told = re.search(r'op_name="([^"]*)"', line)
                    # The compiler chooses an algorithm for products alone.
                    product = '"convolution_algorithm_config"' in line
                    found[(told[1] if told else "", product)] += runs * int(cycles[1])
        return tuple(Operation(*key, cycles) for key, cycles in found.items())

    def collectives(self) -> tuple[Collective, ...]:
        """Returns what passes between devices, equal ones together, the most bytes first."""
        found: collections.Counter = collections.Counter()
        for name, runs in self._runs.items():
            for one in collectives_of(self._lines[name], self._lines) if name not in self._fused else ():
                found[one] += runs
        every = [dataclasses.replace(one, count=count) for one, count in found.items()]
        return tuple(sorted(every, key=lambda one: -one.bytes * one.count))

    def kernels(self) -> tuple[Kernel, ...]:
        """Returns the calls of Pallas kernels, equal ones together."""
        found: collections.Counter = collections.Counter()
        for name, runs in self._runs.items():
            for line in self._lines[name]:
                if 'custom_call_target="tpu_custom_call"' in line:
                    called, shape = re.search(r"%?([\w\-]+?)(?:\.\d+)* = \(?[a-z]+\d*\[([\d,]*)\]", line).groups()
                    found[(called, tuple(map(int, shape.split(","))))] += runs
        return tuple(Kernel(*key, count) for key, count in found.items())

    def _count_runs(self) -> dict[str, int]:
        """Returns how often each computation runs that is reached from the entry; also finds those within fusions."""
        self._fused: set[str] = set()
        runs: collections.Counter = collections.Counter()

        def visit(name: str, times: int, fused: bool) -> None:
            runs[name] += times
            if fused:
                self._fused.add(name)
            for line in self._lines[name]:
                for called, trips, within in self._called(line):
                    visit(called, times * trips, fused or within)

        visit(self._entry, 1, False)
        return dict(runs)

    def _called(self, line: str) -> Iterator[tuple[str, int, bool]]:
        """Yields (computation, trips, whether the caller's cycles are its own) of what a line calls."""
        loop = re.search(r"\bwhile\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
        if loop:
            yield loop[2], _trips(line, self._lines[loop[1]]), False
        called = re.search(r"\bcall\(.*to_apply=%?([\w.\-]+)", line)
        if called:
            yield called[1], 1, False
        branches = re.search(r"\bconditional\(.*branch_computations=\{([^}]*)\}", line)
        if branches:
            # One of them runs; the dearest is taken.
            names = [branch.strip().lstrip("%") for branch in branches[1].split(",")]
            yield max(names, key=self._own_cycles), 1, False
        fused = re.search(FUSED, line)
        if fused:
            yield fused[1], 1, True

    @functools.cache  # noqa: B019 - one text at a time
    def _own_cycles(self, name: str) -> int:
        own = sum(int(found) for line in self._lines[name] for found in re.findall(r'"estimated_cycles":"(\d+)"', line))
        inner = sum(
            trips * self._own_cycles(called)
            for line in self._lines[name]
            for called, trips, within in self._called(line)
            if not within
        )
        return own + inner


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
