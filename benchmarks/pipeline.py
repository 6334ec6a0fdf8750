"""The input pipeline on photographs, beside transformers' processor and beside decoding alone.

    python -m benchmarks.pipeline [--json FILE] [--turns N]

Photographs of 0.2, 1 and 3 megapixels (photographs.py) with a caption each, so a document is an image. Every side
(pipeline_sides.py) is a process of its own, pinned to one core or two, and stopped while another has its turn, so that
all meet the same weather. Both of transformers' image processors are tried where torchvision is installed, and the
faster is what we are compared with.

On one core, a second is one of the side's CPU time: what a core gives that is not shared. On two it is the clock's,
since transformers' workers are processes of their own. Ratios are medians over turns.

The second table says where the time of a document goes, each step on one core; beside the steps together stands what
the whole pipeline takes on it. The pixels are those of images.resizer = simd; the last column is their mean difference
from the reference's, in levels of 255.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import photographs
from benchmarks import pipeline_sides as sides
from benchmarks.pipeline_steps import STEPS, difference, steps
from idefics_jax import commands
from idefics_jax.errors import UserError
from idefics_jax.processor import Processor
from idefics_jax.tokenizer import Tokenizer
from launch import report

_TURNS = flags.DEFINE_integer("turns", 3, "timed turns of each side", lower_bound=1)

# Images of a turn: a second of our work.
MEGAPIXELS = {0.2: 400, 1.0: 120, 3.0: 72}
TRANSFORMERS = ("transformers-pil", "transformers-fast")


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a side did in one turn: images, seconds by the clock and of CPU time, and its peak memory until then."""

    images: int
    seconds: float
    cpu: float
    gib: float


class Side:
    """A side's process, which runs only while it has its turn."""

    def __init__(self, name: str, folder: Path, cores: Sequence[int]):
        self.name = name
        self.cores = len(cores)
        command = [sys.executable, "-m", "benchmarks.pipeline_sides", name, str(folder), str(len(cores))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self._running = True

    def turn(self, count: int) -> Turn:
        """Lets it make `count` images, or a few more; raises UserError if it ends instead."""
        if not self._running:
            os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise UserError(f"the side {self.name} of the benchmark ended; its last words are above")
        os.killpg(self._process.pid, signal.SIGSTOP)
        self._running = False
        return Turn(**json.loads(answer))

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def prepare(folder: Path, megapixels: float) -> int:
    """Writes photographs and a processor of the released sizes; returns the mean bytes of a photograph."""
    size = photographs.write(folder, megapixels)
    (data,) = importlib.util.find_spec("mistral_common").submodule_search_locations
    tokenizer = Tokenizer.load(f"{data}/data/tokenizer.model.v1")
    Processor(tokenizer, sides.RULES, num_latents=64).save(folder / "processor")
    return size


def race(folder: Path, cores: Sequence[int], count: int) -> dict[str, list[Turn]]:
    """Gives every side its turns, the first of which is not counted."""
    fast = () if importlib.util.find_spec("torchvision") else ("transformers-fast",)
    runners: list[Side] = []
    try:
        for name in sides.SIDES:
            if name not in fast:
                runners.append(Side(name, folder, cores))
                runners[-1].turn(count // 3)
        turns = [{side.name: side.turn(count) for side in runners} for _ in range(_TURNS.value)]
    finally:
        for side in runners:
            side.end()
    return {name: [turn[name] for turn in turns] for name in turns[0]}


def rates(turns: dict[str, list[Turn]], cores: int) -> dict[str, list[float]]:
    """Returns images a second of every turn."""
    return {
        name: [turn.images / (turn.cpu if cores == 1 else turn.seconds) for turn in side]
        for name, side in turns.items()
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(np.divide(ours, theirs))


def main() -> None:
    # Stopped from outside, it still ends its sides.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cores = sorted(os.sched_getaffinity(0))[:2]
    table, where, numbers = [], [], {}
    print(f"{len(cores)} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for megapixels, count in MEGAPIXELS.items():
            folder = Path(scratch) / str(megapixels)
            size, name = prepare(folder, megapixels), f"{megapixels:g}mp"
            spent, off = steps(folder), difference(folder)
            numbers |= {f"pixel_difference_{name}": off} | {f"ms_{step}_{name}": spent[step] for step in STEPS}
            for pinned in {1: cores[:1], len(cores): cores}.values():
                turns = race(folder, pinned, count)
                speed = rates(turns, len(pinned))
                theirs = max(set(TRANSFORMERS) & set(speed), key=lambda side: statistics.median(speed[side]))
                ratios = ratio(speed["ours"], speed[theirs]), ratio(speed["ours"], speed["bare"])
                gib = max(turn.gib for turn in turns["ours"])
                medians = [statistics.median(speed[side]) if side in speed else "-" for side in sides.SIDES]
                table.append([f"{name}, {size // 1024} KiB", len(pinned), *medians, *ratios, gib])
                key = f"{name}_{len(pinned)}"
                numbers |= {f"images_over_transformers_{key}": ratios[0], f"images_over_bare_{key}": ratios[1]}
                numbers |= {f"images_per_s_{key}": medians[0], f"host_memory_gib_{key}": gib}
            whole = 1e3 / numbers[f"images_per_s_{name}_1"]
            where.append([name, *(spent[step] for step in STEPS), sum(spent.values()), whole, off])
            print(f"{name}: done, load {os.getloadavg()[0]:.1f}", flush=True)
    for what in ("images_over_transformers", "images_over_bare"):
        numbers[what] = min(value for key, value in numbers.items() if key.startswith(what) and key.endswith("mp_1"))
    numbers["host_memory_gib"] = max(value for key, value in numbers.items() if key.startswith("host_memory_gib"))
    print("images (= documents) a second")
    heads = ["photographs", "cores", *sides.SIDES, "over transformers", "over bare", "GiB"]
    report.print_table(heads, table)
    print("\nmilliseconds of a document")
    report.print_table(["photographs", *STEPS, "together", "pipeline", "levels beside"], where)
    report.write_json(numbers)


if __name__ == "__main__":
    commands.run(main)
