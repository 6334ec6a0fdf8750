"""Damages files at random and reads them, for as long as it is told to: only the errors we name may come out.

    python -m benchmarks.fuzz --seconds 600 --target png --target parquet-obelics

A target (fuzz_targets.py) is a format with a few whole files of it. Each is damaged again and again (bits and numbers
set, ranges removed, repeated or taken from another file, ends cut off) and read as training or preparation reads it.
What is read follows from the seed, the target and a number, so what is found can be had again: it is kept in
--findings. Each target runs in a process of its own with --memory_mib to itself, so that a crash in a decoder, or a few
bytes that ask for gigabytes, are found too.

Columns: files read; files a second; share of them that was refused, the others could be read; the slowest, in seconds;
how much the process's memory grew, in MiB.
"""

import faulthandler
import multiprocessing
import resource
import tempfile
import time
import traceback
from pathlib import Path

from absl import flags

from benchmarks import fuzz_targets
from idefics_jax import commands
from idefics_jax.errors import UserError
from launch import report

_SECONDS = flags.DEFINE_float("seconds", 60.0, "how long, all targets together", lower_bound=0.0)
_TARGET = flags.DEFINE_multi_string("target", [], "targets to read, all by default; may be given more than once")
_SEED = flags.DEFINE_integer("seed", 0, "of the damage", lower_bound=0)
_MEMORY_MIB = flags.DEFINE_integer("memory_mib", 2048, "what reading may allocate, in MiB", lower_bound=1)
_FINDINGS = flags.DEFINE_string("findings", "work/fuzz", "folder that takes the files that were read wrongly")


def read_for(name: str, seconds: float, seed: int, memory_mib: int, findings: Path, told) -> None:
    """Reads damaged files of one target; runs in a process of its own.

    Args:
      name: of the target.
      seconds: how long.
      seed: of the damage.
      memory_mib: address space it may take beyond what it has when it begins.
      findings: folder that takes what was read wrongly.
      told: shared array of doubles: files read, of them refused, slowest in seconds, growth in MiB, faults.
    """
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        target = fuzz_targets.targets(Path(folder))[name]
        target.read(target.seeds[0])  # so that what is loaded once is loaded
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        end = time.monotonic() + seconds
        while (before := time.monotonic()) < end:
            number = int(told[0])
            data = fuzz_targets.mutated(target, name, seed, number)
            try:
                told[1] += not target.read(data)
            except fuzz_targets.REFUSALS:
                told[1] += 1
            except Exception:
                told[4] += 1
                findings.mkdir(parents=True, exist_ok=True)
                (findings / f"{name}-{seed}-{number}").write_bytes(data)
                (findings / f"{name}-{seed}-{number}.txt").write_text(traceback.format_exc())
                print(f"{name} {number}: {traceback.format_exc().splitlines()[-1]}", flush=True)
            told[2] = max(told[2], time.monotonic() - before)
            told[3] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun) / 2**10
            told[0] += 1


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        known = list(fuzz_targets.targets(Path(folder)))
    names = _TARGET.value or known
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"--target {unknown[0]} is not known; the targets are {', '.join(known)}")
    rows, numbers, faults = [], {}, 0
    spawn, seconds = multiprocessing.get_context("spawn"), _SECONDS.value / len(names)
    for name in names:
        told = spawn.Array("d", 5)
        settings = (name, seconds, _SEED.value, _MEMORY_MIB.value, Path(_FINDINGS.value), told)
        process = spawn.Process(target=read_for, args=settings)
        process.start()
        process.join()
        read, refused, slowest, grown, found = told[:]
        if process.exitcode:
            found += 1
            print(f"{name} {int(read)}: the process ended with status {process.exitcode}", flush=True)
        rate = read / seconds if seconds else 0.0
        rows.append([name, f"{read:,.0f}", f"{rate:,.0f}", refused / max(read, 1), slowest, f"{grown:,.0f}"])
        numbers |= {f"{name}_a_second": rate, f"{name}_slowest_seconds": slowest, f"{name}_grown_mib": grown}
        faults += int(found)
    report.print_table(["target", "read", "a second", "refused", "slowest", "grown"], rows)
    report.write_json({**numbers, "faults": faults})
    if faults:
        raise UserError(
            f"{faults} files were read wrongly; those that did not end the process lie in {_FINDINGS.value}"
        )


if __name__ == "__main__":
    commands.run(main)
