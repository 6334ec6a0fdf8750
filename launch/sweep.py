"""Runs the numbered runs of a comparison, here or on rented slices, and makes a table and a picture of those finished.

    python -m launch.sweep --config configs/sweeps/adaptation.py [--workdir DIR] [--runs 0,4] [--dry-run]
    python -m launch.sweep --config FILE --workdir gs://BUCKET/FOLDER --backend jobset --name rates --slice v5e-16 ...
    python -m launch.sweep --config FILE --workdir gs://BUCKET/FOLDER --report

The file's `sweep()` says what the runs are. Each is an ordinary training in a folder of its own, called by its number;
the settings of all are checked before the first one starts. Backends:

    local    one after another on this machine, once all that they need is known to be there. What has finished is not
             run again, so that the same command goes on with a sweep that was stopped; a run that fails is named at the
             end, and the others go on.
    tpu-vm   one request to Google's queue for each run (launch/tpu_vm.py)
    jobset   one JobSet for each run (launch/gke.py)

The last two only ask: when each run starts is for the queue and the cluster to say.
"""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
from absl import flags
from etils import epath

from idefics_jax import buckets, commands
from idefics_jax.errors import UserError
from launch import devices, gke, sweep_runs, tpu_vm
from launch import job as jobs
from launch.finished import is_trained
from launch.sweep_report import collect, is_done, write
from launch.sweep_runs import Sweep

BACKENDS = {"tpu-vm": tpu_vm.submit, "jobset": gke.submit}

flags.adopt_module_key_flags(jobs)
_CONFIG = flags.DEFINE_string("config", None, "FILE[:argument] whose sweep() says what to run")
_WORKDIR = commands.define_folder("workdir", None, "folder of all runs; the sweep's own if not given")
_RUNS = flags.DEFINE_list("runs", [], "numbers of the runs; all if not given")
_BACKEND = flags.DEFINE_enum("backend", "local", ["local", *BACKENDS], "where they run")
_REPORT = flags.DEFINE_boolean("report", False, "make the table of what has finished, and stop")


def command(log: Path, module: str, *arguments: str) -> bool:
    """Runs a command of this package with its output in `log`; returns whether it succeeded."""
    print(f"$ python -m {module} {' '.join(arguments)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=file, stderr=file, check=False)
    if done.returncode:
        said = log.read_text().strip().splitlines() or ["nothing"]
        print(f"  failed: {said[-1]} (all of it: {log})", flush=True)
    return done.returncode == 0


def run_one(sweep: Sweep, number: int) -> bool:
    """Trains and evaluates one run, as far as that is not done yet; returns whether it is."""
    folder = Path(sweep.folder(number))
    if not is_trained(folder, used=bool(sweep.config.evaluate)):
        command(folder / "train.log", "idefics_jax.train", *sweep.training(number))
        if not is_trained(folder, used=bool(sweep.config.evaluate)):
            return False
    return not sweep.config.evaluate or command(folder / "eval.log", "idefics_jax.evaluate", *sweep.evaluation(number))


def write_data(sweep: Sweep) -> None:
    """Writes the data of all runs; raises UserError if that fails."""
    log = Path(sweep.workdir, "data.log")
    if sweep.config.data and not command(log, *sweep.config.data):
        raise UserError(f"the data could not be written; see {log}")


def pretrain(sweep: Sweep) -> None:
    """Trains what all runs start from; raises UserError if that fails."""
    folder = Path(sweep.start)
    command(folder / "train.log", "idefics_jax.train", *sweep.pretraining())
    if not is_trained(folder, used=True):
        raise UserError(f"the model that all runs start from could not be trained; see {folder}/train.log")


def run_here(sweep: Sweep, numbers: list[int]) -> list[int]:
    """Runs what is left one after another, with a line of progress before each; returns the numbers that failed.

    A run that has its figures is done, whether or not its model was kept.

    Raises:
      UserError: the data or what all start from failed, or a run could not start (Sweep.rehearse).
    """
    failed = []
    numbers = [number for number in numbers if not is_done(sweep, number)]
    if not numbers:
        return []
    write_data(sweep)
    pretrains = bool(sweep.config.pretrain) and not is_trained(Path(sweep.start), used=True)
    sweep.rehearse(numbers, pretrains=pretrains, here=devices.found())
    if pretrains:
        pretrain(sweep)
    started = time.monotonic()
    for done, number in enumerate(numbers):
        spent = time.monotonic() - started
        left = f", about {spent / done * (len(numbers) - done) / 60:.0f} min left" if done else ""
        print(f"[{done + 1}/{len(numbers)}] {sweep.title(number)}; {spent / 60:.1f} min so far{left}", flush=True)
        if not run_one(sweep, number):
            failed.append(number)
    return failed


def start_elsewhere(sweep: Sweep, numbers: list[int], backend: str) -> None:
    """Asks for slices for each run.

    Raises:
      UserError: they cannot run elsewhere (Sweep.check_rentable), or a flag is missing.
    """
    sweep.check_rentable(numbers)
    missing = [name for name in ("name", "slice", "image") if flags.FLAGS[name].value is None]
    if missing:
        raise UserError(f"--{missing[0]} is missing; --backend {backend} needs it")
    for number in numbers:
        job = jobs.from_flags(["python", "-m", "idefics_jax.train", *sweep.training(number)])
        print(f"# {sweep.title(number)}", flush=True)
        BACKENDS[backend](replace(job, name=f"{job.name}-{sweep_runs.digits(number)}"))


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # the devices are for the runs
    sweep = sweep_runs.read(_CONFIG.value, _WORKDIR.value)
    numbers = sweep.chosen(_RUNS.value)
    failed: list[int] = []
    if _REPORT.value:
        buckets.check(sweep.workdir)
    else:
        sweep.check(numbers)
        if _BACKEND.value != "local":
            start_elsewhere(sweep, numbers, _BACKEND.value)
            return
        if flags.FLAGS["dry-run"].value:
            print("\n".join(sweep.dry_run(numbers)))
            return
        failed = run_here(sweep, numbers)
    results = collect(sweep)
    if results:
        print(f"\n{write(epath.Path(sweep.workdir), results, sweep.config.metric)}")
    print(f"{len(results)} of {len(sweep.config.runs)} runs have finished; table and picture in {sweep.workdir}")
    if failed:
        names = ", ".join(map(sweep_runs.digits, failed))
        raise UserError(f"{len(failed)} of {len(numbers)} runs failed: {names}; run the command again")


if __name__ == "__main__":
    commands.run(main, required=("config",))
