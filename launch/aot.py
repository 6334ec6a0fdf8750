"""Compiles a recipe's training step for a TPU slice without one: whether it fits, and how fast it could be.

    python -m launch.aot --config configs/idefics2_8b/stage2.py --slice v5e-256 [--json FILE]
    python -m launch.aot --config configs/idefics2_8b/stage2.py --slice v5e-256 --config.vision_remat=linear
    python -m launch.aot --config configs/idefics2_8b/stage2.py --slice v5e-256 --search

The step is the one that training runs, with its mesh, shardings and donation, compiled by the slice's own compiler
(libtpu, requirements-test.txt). Step seconds are the cycles it expects, the time of our kernels reckoned from the
blocks they compute (kernels.py), and that of collectives which nothing hides. MFU counts what the algorithm needs for
real tokens and patches (flops.py), HFU what the program does. `--trained_in_full` compiles the same step with every
parameter trained, as published figures are. `--fits_only` stops at memory and collectives: most of the compiler's time
goes into code that nothing here runs. `--search` so tries remat policies of the decoder and of the vision tower, and at
the edge of what fits ever more rows a device at once; it tells first what computes least again. No weight or data is
read: documents have the sizes of launch/stage_mixes.py, or with `--full_rows` fill their rows.
"""

import dataclasses
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from idefics_jax import commands, sharding
from idefics_jax.batch import BatchShape
from idefics_jax.errors import UserError
from idefics_jax.stack import REMAT_POLICIES
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.run import device_rows
from launch import calibration, estimate, kernels, program, slices
from launch.chips import CHIPS
from launch.collectives import KINDS, Collective
from launch.compiled_step import Compiled, blocks_of, compile_step, estimated, traced_step
from launch.estimate import gib
from launch.flops import Trained, step_flops
from launch.frontier import divisors, frontier
from launch.program import DoesNotFit
from launch.report import print_table, write_json
from launch.slice_flag import SLICE
from launch.workload import Rows, full_rows, packed_rows

_CONFIG = commands.define_config(None, "what to train, configs/NAME.py[:argument]")
_SEARCH = flags.DEFINE_boolean("search", False, "find the cheapest remat policies that fit, and the most rows at once")
_FITS_ONLY = flags.DEFINE_boolean("fits_only", False, "stop at memory and collectives, known in a tenth of the time")
_DUMP_TO = flags.DEFINE_string("dump_to", None, "folder for what the compiler writes of its program as it goes")
_IN_FULL = flags.DEFINE_boolean("trained_in_full", False, "train every parameter instead of what the recipe trains")
_FULL_ROWS = flags.DEFINE_boolean("full_rows", False, "take rows as full of one document and one image a vision row")

LISTED = 8  # collectives printed one by one
# What the recipes' partition becomes where everything trains.
IN_FULL = {"partition": ((".*", "trainable", 1.0, 0.1),), "lora": {}, "new_rows": 0, "quantize": ()}


def report(compiled: Compiled, config: TrainConfig, rows: Rows, where: slices.Slice) -> dict[str, float]:
    """Prints what was found, and returns its numbers."""
    cost, found = compiled.cost, estimated(compiled, config, rows, where)
    chip, sizes = CHIPS[where.generation], compiled.plan.sizes
    work = rows.work(config.data.shape.rows, sizes.text_config.sliding_window)
    fill = rows.fill
    print(f"\nfits: {gib(cost.peak_bytes):.2f} GiB of {gib(chip.hbm_bytes):.2f} a device, arguments ", end="")
    print(f"{gib(cost.argument_bytes):.2f}")
    print(f"real tokens {fill[0]:.3f} and patches {fill[1]:.3f} of their places; a step has {work.tokens:,.0f} tokens")
    flops = step_flops(sizes, work, Trained.of(compiled.plan.state["trainable"]))
    print("\noperations that a step needs")
    print_table(["part", "TFLOP", "share"], [[part, x / 1e12, x / found.needed] for part, x in flops.items()])
    print("\nwhere a step's time goes, seconds")
    blocks = blocks_of(cost, sizes, rows)
    print_table(
        ["", "s"],
        [
            ["compiler's cycles", found.compute],
            *(
                [f"attention kernels, {part}", own / chip.clock]
                for part, own in kernels.cycles(cost.kernels, blocks, sizes, where.generation).items()
            ),
            ["collectives that nothing hides", found.collectives],
            ["collectives beside computation (not added)", estimate.hidden_seconds(cost, where)],
        ],
    )
    print("\nthe compiler's cycles by part of the model, seconds")
    print_table(
        ["part", "pass", "products", "all else"],
        [[*key, *(own / chip.clock for own in cycles)] for key, cycles in estimate.by_part(cost.operations).items()],
    )
    print("\ncollectives a step, on each device")
    print_collectives(cost.collectives)
    print(
        f"\nestimated: {found.seconds:.3f} s a step, MFU {found.mfu:.3f}, HFU {found.hfu:.3f}, "
        f"{work.tokens / found.seconds / found.chips:,.0f} tokens a second and chip"
    )
    error = calibration.error(where.generation)
    print(calibration.sentence(where.generation))
    return {
        "fits": True,
        "peak_gib": gib(cost.peak_bytes),
        "estimated_step_seconds": found.seconds,
        "estimated_mfu": found.mfu,
        "estimated_hfu": found.hfu,
        "compute_seconds": found.compute,
        "kernel_seconds": found.kernels,
        "exposed_collective_seconds": found.collectives,
        "needed_tflop": found.needed / 1e12,
        "done_tflop": found.done / 1e12,
        "token_fill": fill[0],
        "patch_fill": fill[1],
        "calibration_error": error,
    }


def memory(arguments: list[str]) -> tuple[int, tuple[Collective, ...]]:
    """Compiles in a process of its own until memory and collectives are known; returns peak bytes a device and those.

    Args:
      arguments: of this command.

    Raises:
      DoesNotFit: it takes more memory than a chip has.
      UserError: what the other process says, if it ends before.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = ["--nofits_only", "--nosearch", f"--dump_to={folder}"]
        command = [sys.executable, "-m", "launch.aot", *arguments, *own]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                while (found := program.dumped(Path(folder), "jit_step")) is None and process.poll() is None:
                    time.sleep(0.5)
            finally:
                process.kill()
            said, wrong = process.communicate()
    if found is None and "it does not fit" in said:
        raise DoesNotFit(said.partition("it does not fit: ")[2])
    if found is None:
        raise UserError(f"the compiler ended without a word of memory: {wrong.strip().splitlines()[-1:] or said}")
    return found


def fits(arguments: list[str]) -> dict[str, float]:
    """Prints memory and collectives, see `memory`, and returns the numbers."""
    try:
        peak, collectives = memory(arguments)
    except DoesNotFit as error:
        return unfit(error)
    print(f"fits: {gib(peak):.2f} GiB a device\n")
    print_collectives(collectives)
    return {"fits": True, "peak_gib": gib(peak)}


def unfit(error: DoesNotFit) -> dict[str, float]:
    """Prints that a step does not fit, and returns the numbers."""
    print(error)
    return {"fits": False} | ({"peak_gib": gib(error.bytes_wanted)} if error.bytes_wanted else {})


def print_collectives(collectives: tuple[Collective, ...]) -> None:
    """Prints the sums of each kind, and the few that move most."""
    rows = []
    for kind in KINDS:
        own = [one for one in collectives if one.kind == kind]
        if own:
            total, times = sum(one.bytes * one.count for one in own), sum(one.count for one in own)
            rows.append([f"{kind}, all", total / 2**20, times, "", ""])
    for one in collectives[:LISTED]:
        shape = one.shape if len(one.shape) < 60 else f"{one.shape[:56]} ..."
        rows.append([f"{one.kind} of {shape}", one.bytes * one.count / 2**20, one.count, one.devices, one.beside or ""])
    print_table(["", "MiB", "times", "devices", "cycles beside each"], rows)


def check(values: Any, slice_name: str, *, rows: Rows | None, dump_to: str | None) -> dict[str, float]:
    """Compiles a recipe for a slice, prints what is found and returns it.

    Args:
      values: what a file in configs/ returns.
      slice_name: see slices.find.
      rows: packed ones, or None to pack the recipe's mixture.
      dump_to: folder for what the compiler writes of its program, or None.
    """
    config, where = TrainConfig.from_config_dict(values.to_dict()), slices.find(slice_name)
    rows = packed_rows(values) if rows is None else rows
    try:
        return report(compile_step(config, slice_name, dump_to=dump_to), config, rows, where)
    except DoesNotFit as error:
        return unfit(error)


def search(values: Any, slice_name: str, arguments: list[str]) -> dict[str, float]:
    """Finds the remat policies that fit and keep the most, and for each the most rows a device that fit at once.

    The batch stays the recipe's: of a device's share of it so many rows are computed at once. Prints what was found,
    what computes least again first, and returns it; `arguments` are those of this command.
    """
    config = TrainConfig.from_config_dict(values.to_dict())
    mesh = sharding.make_mesh(config.mesh, program.slice_devices(slice_name))
    counts = divisors(device_rows(mesh, config.data.shape.rows))
    peaks = frontier(tuple(REMAT_POLICIES), lambda *kept: _peak(arguments, kept, rows=1))
    found = []
    for kept, peak in peaks.items():
        largest = 1, peak
        for rows in counts[1:]:
            peak = _peak(arguments, kept, rows)
            if peak is None:
                break
            largest = rows, peak
        own = dataclasses.replace(config, remat=kept[0], vision_remat=kept[1])
        found.append((traced_step(own, slice_name)[1], kept, *largest))
    found.sort()
    print()
    print_table(
        ["remat", "vision_remat", "rows_a_device", "peak GiB", "PFLOP of products"],
        [[*kept, rows, gib(peak), operations / 1e15] for operations, kept, rows, peak in found],
    )
    return {f"rows_a_device_{'_'.join(kept)}": rows for _, kept, rows, _ in found}


def _peak(arguments: list[str], kept: tuple[str, str], rows: int) -> int | None:
    """Returns the peak bytes of a step with other settings, or None where it does not fit; says which."""
    settings = {"remat": kept[0], "vision_remat": kept[1], "rows_a_device": rows}
    said = ", ".join(f"{name} {value}" for name, value in settings.items())
    try:
        peak, _ = memory([*arguments, *(f"--config.{name}={value}" for name, value in settings.items())])
    except DoesNotFit as error:
        print(f"{said}: {error}", flush=True)
        return None
    print(f"{said}: {gib(peak):.2f} GiB", flush=True)
    return peak


def check_machines(config: TrainConfig, where: slices.Slice) -> None:
    """Raises UserError where the virtual shards of the data cannot be dealt out to the machines of a slice."""
    shape = sharding.mesh_shape(config.mesh, where.chips * where.count, where.count)
    parts = math.prod(shape) // shape[sharding.MESH_AXES.index("tensor")]
    machines = min(where.hosts * where.count, parts)
    if config.data.virtual_shards % machines:
        raise UserError(
            f"{where.name} has {machines} machines that read data of their own, which cannot share "
            f"data.virtual_shards = {config.data.virtual_shards}; give --config.data.virtual_shards={machines}"
        )


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for a TPU
    values = _CONFIG.value
    if _IN_FULL.value:
        with values.unlocked():
            values.update(IN_FULL)
    rows = full_rows(BatchShape(**values.data.shape)) if _FULL_ROWS.value else None
    check_machines(TrainConfig.from_config_dict(values.to_dict()), slices.find(SLICE.value))
    if _FITS_ONLY.value:
        numbers = fits(sys.argv[1:])
    elif _SEARCH.value:
        numbers = search(values, SLICE.value, sys.argv[1:])
    else:
        numbers = check(values, SLICE.value, rows=rows, dump_to=_DUMP_TO.value)
    write_json(numbers)


if __name__ == "__main__":
    commands.run(main, required=("config", "slice"))
