"""Runs every arm of a comparison on several seeds, one after another, and leaves a table and a picture.

    python -m launch.sweep --config configs/sweeps/adaptation.py [--config.workdir=DIR] [--config.seeds='(0,)']

A sweep's config file returns, without an argument, what to run, and with an arm's name that arm's training config; so
each run is an ordinary command, printed before it starts, that can be run alone. A run that has finished is not run
again: the same command goes on with a sweep that was stopped. A run that fails is named at the end; the others go on.
"""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from idefics_jax import commands, settings
from idefics_jax.errors import UserError
from idefics_jax.training.summary import SUMMARY_FILE
from launch.sweep_report import Result, draw, table

_CONFIG = commands.define_config(None, "what to compare, configs/sweeps/NAME.py")


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A comparison.

    Attributes:
      workdir: folder of all its runs.
      data: module and arguments of the command that writes the data, or empty.
      pretrain: argument of the config file for the run that all arms start from, or "" for none.
      arms: arguments of the config file, one an arm.
      seeds: each arm is run on each.
      evaluate: config file of the evaluation.
      metric: of that evaluation, the one compared.
    """

    workdir: str
    data: tuple[str, ...]
    pretrain: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    evaluate: str
    metric: str

    def __post_init__(self):
        for name in ("arms", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} is {values}; give at least one, each once")


def command(log: Path, module: str, *arguments: str) -> bool:
    """Runs a command of this package with its output in `log`; returns whether it succeeded."""
    print(f"$ python -m {module} {' '.join(arguments)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=file, stderr=file, check=False)
    if done.returncode:
        print(f"  failed: {log.read_text().strip().splitlines()[-1]} (all of it: {log})", flush=True)
    return done.returncode == 0


def run_arm(config: SweepConfig, file: str, arm: str, seed: int, start: Path | None) -> Result | None:
    """Trains and evaluates one arm on one seed, if that is not done yet; None if it failed."""
    folder = Path(config.workdir, f"{arm}-{seed}")
    figures = folder / "eval" / "metrics.json"
    if not figures.exists():
        chosen = [f"--config.seed={seed}", f"--config.data.seed={seed}"]
        chosen += [f"--config.init_from={start}"] if start else []
        train = ("--config", f"{file}:{arm}", "--workdir", str(folder), *chosen)
        evaluate = ("--checkpoint", str(folder), "--config", config.evaluate)
        if not command(folder / "train.log", "idefics_jax.train", *train):
            return None
        if not command(folder / "eval.log", "idefics_jax.evaluate", *evaluate):
            return None
    score = json.loads(figures.read_text())[config.metric]
    return Result(arm, seed, score, json.loads((folder / SUMMARY_FILE).read_text()))


def prepare(config: SweepConfig, file: str) -> Path | None:
    """Writes the data and trains what all arms start from; returns its folder.

    Raises:
      UserError: either failed, so that no arm can run.
    """
    folder = Path(config.workdir, config.pretrain) if config.pretrain else None
    if config.data and not command(Path(config.workdir, "data.log"), *config.data):
        raise UserError(f"the data could not be written; see {config.workdir}/data.log")
    if folder and not (folder / SUMMARY_FILE).exists():
        arguments = ("--config", f"{file}:{config.pretrain}", "--workdir", str(folder))
        if not command(folder / "train.log", "idefics_jax.train", *arguments):
            raise UserError(f"the model that all arms start from could not be trained; see {folder}/train.log")
    return folder


def main() -> None:
    file = flags.FLAGS["config"].config_filename
    config = settings.build(SweepConfig, _CONFIG.value.to_dict(), "config")
    started, start = time.monotonic(), prepare(config, file)
    runs = [(arm, seed) for seed in config.seeds for arm in config.arms]
    results, failed = [], []
    for done, (arm, seed) in enumerate(runs):
        spent = time.monotonic() - started
        left = f", about {spent / done * (len(runs) - done) / 60:.0f} min left" if done else ""
        print(f"[{done + 1}/{len(runs)}] {arm}, seed {seed}; {spent / 60:.1f} min so far{left}", flush=True)
        result = run_arm(config, file, arm, seed, start)
        if result is None:
            failed.append(f"{arm}-{seed}")
        else:
            results.append(result)
    if results:
        text = table(results, config.arms, config.metric)
        Path(config.workdir, "table.md").write_text(text)
        lines = [json.dumps(dataclasses.asdict(result)) + "\n" for result in results]
        Path(config.workdir, "results.jsonl").write_text("".join(lines))
        picture = draw(Path(config.workdir), results, config.arms, config.metric)
        print(f"\n{text}\nin {(time.monotonic() - started) / 60:.1f} min; table and picture in {picture.parent}")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; run the command again")


if __name__ == "__main__":
    commands.run(main, required=("config",))
