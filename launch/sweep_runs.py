"""What the runs of a sweep are: read from a config file's `sweep()`, numbered, and checked before any starts.

def sweep():
    return {"runs": [{"settings": {"optimizer.learning_rate": rate}} for rate in (1e-4, 3e-4)]}
"""

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from idefics_jax import commands, settings
from idefics_jax.config import Idefics2Config
from idefics_jax.errors import UserError
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.loop import check_same_run
from idefics_jax.training.plan import plan
from launch.devices import Devices
from launch.rehearsal import rehearse

# Runs that differ in these alone are repetitions: one row of the table.
SEEDS = ("seed", "data.seed")
# Compared where a sweep names no evaluation.
TRAINING_METRIC = "train/loss"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run.

    Attributes:
      argument: of the config file; the one given on the command line if empty.
      settings: dotted names and their values, as --config.NAME=VALUE.
    """

    argument: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def arm(self) -> str:
        """What the run shares with its repetitions on other seeds."""
        rest = [f"{name}={value}" for name, value in self.settings.items() if name not in SEEDS]
        return " ".join([self.argument] * bool(self.argument) + rest) or "as it is"


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """What a config file's `sweep()` returns.

    Attributes:
      runs: in the order of their numbers.
      workdir: folder of all runs, unless the command line gives one.
      data: module and arguments of the command that writes the data, or empty.
      pretrain: argument of the config file for the run that all others start from, or "" for none.
      evaluate: config file of the evaluation, or "" for none.
      metric: what is compared: of that evaluation, or of metrics.jsonl's last line.
    """

    runs: tuple[RunConfig, ...]
    workdir: str = ""
    data: tuple[str, ...] = ()
    pretrain: str = ""
    evaluate: str = ""
    metric: str = TRAINING_METRIC

    def __post_init__(self):
        if not self.runs:
            raise UserError("sweep() names no runs; give at least one")
        for number, run in enumerate(self.runs):
            if run in self.runs[:number]:
                first = self.runs.index(run)
                raise UserError(f"runs {first} and {number} of sweep() are the same, {run.arm}; give each once")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of one file in one folder.

    Attributes:
      file: the config file.
      argument: given with it, or "".
      workdir: folder of all runs.
      config: what its `sweep()` returned.
    """

    file: str
    argument: str
    workdir: str
    config: SweepConfig

    @property
    def start(self) -> str:
        """Folder of the run that all others start from."""
        return f"{self.workdir}/{self.config.pretrain}"

    def folder(self, number: int) -> str:
        """Returns the work directory of a run."""
        return f"{self.workdir}/{digits(number)}"

    def title(self, number: int) -> str:
        """Returns a run's number and what is its own."""
        run = self.config.runs[number]
        seeds = [f"{name}={run.settings[name]}" for name in SEEDS if name in run.settings]
        return " ".join([f"{digits(number)}:", run.arm, *seeds])

    def overrides(self, number: int) -> list[str]:
        """Returns a run's settings as NAME=VALUE."""
        own = [f"{name}={value}" for name, value in self.config.runs[number].settings.items()]
        return [f"init_from={self.start}", *own] if self.config.pretrain else own

    def source(self, number: int) -> str:
        """Returns FILE[:argument] of a run."""
        return _source(self.file, self.config.runs[number].argument or self.argument)

    def training(self, number: int) -> list[str]:
        """Returns the arguments of the training of a run."""
        own = [f"--config.{override}" for override in self.overrides(number)]
        return ["--config", self.source(number), "--workdir", self.folder(number), *own]

    def pretraining(self) -> list[str]:
        """Returns the arguments of the training that comes first."""
        return ["--config", _source(self.file, self.config.pretrain), "--workdir", self.start]

    def evaluation(self, number: int) -> list[str]:
        """Returns the arguments of the evaluation of a run."""
        return ["--checkpoint", self.folder(number), "--config", self.config.evaluate]

    def chosen(self, given: Sequence[str]) -> list[int]:
        """Returns the numbers that the command line gives, or all.

        Raises:
          UserError: one is no number of a run.
        """
        for word in given:
            if not word.isdigit() or int(word) >= len(self.config.runs):
                raise UserError(f"--runs has {word!r}; the runs are 0 to {len(self.config.runs) - 1}")
        return sorted({int(word) for word in given}) or list(range(len(self.config.runs)))

    def check(self, numbers: Sequence[int]) -> None:
        """Raises UserError unless every run's settings can be used and are those of the run its folder may hold."""
        for number in numbers:
            with self.naming(number):
                _, values = self.settings(number)
                if not self.folder(number).startswith("gs://"):  # there, the training itself looks
                    check_same_run(values, epath.Path(self.folder(number)))

    def settings(self, number: int | None) -> tuple[TrainConfig, dict[str, Any]]:
        """Returns the settings of a run, or with None of the one that comes first; and the same as they were given."""
        source = _source(self.file, self.config.pretrain) if number is None else self.source(number)
        values = commands.read_config(source, [] if number is None else self.overrides(number)).to_dict()
        return TrainConfig.from_config_dict(values), values

    def rehearse(self, numbers: Sequence[int], *, pretrains: bool, here: Devices) -> None:
        """Rehearses the runs, and first what they start from if that is yet to be trained.

        Raises:
          UserError: see `rehearse`; it names the run.
        """
        written: dict[str, Idefics2Config] = {}
        for number in [None] * pretrains + list(numbers):
            with self.naming(number):
                folder = self.start if number is None else self.folder(number)
                config, _ = self.settings(number)
                written[folder] = rehearse(config, epath.Path(folder), devices=here, written=written)

    @contextlib.contextmanager
    def naming(self, number: int | None) -> Iterator[None]:
        """Puts a run's name before what is wrong with it."""
        try:
            yield
        except UserError as error:
            title = self.config.pretrain if number is None else self.title(number)
            raise UserError(f"run {title}: {error}") from error

    def check_rentable(self, numbers: Sequence[int]) -> None:
        """Raises UserError where the runs need this machine, or shapes alone tell that one would not start."""
        if not self.workdir.startswith("gs://"):
            raise UserError(f"--workdir is {self.workdir}; rented machines share no disk with this one, give gs://...")
        if self.config.data or self.config.pretrain:
            raise UserError(
                f"{self.file} has steps before its runs (data, pretrain), and they run here only; do them first, and "
                "give a sweep() without them whose settings name what they left"
            )
        for number in numbers:
            with self.naming(number):
                config, _ = self.settings(number)
                if config.model:  # otherwise its sizes lie where it will run
                    plan(config)

    def dry_run(self, numbers: Sequence[int]) -> list[str]:
        """Returns the commands of a sweep on this machine."""
        train, lines = "idefics_jax.train", []
        if self.config.data:
            lines.append(_line(*self.config.data))
        if self.config.pretrain:
            lines.append(_line(train, *self.pretraining()))
        for number in numbers:
            lines += [f"# {self.title(number)}", _line(train, *self.training(number))]
            if self.config.evaluate:
                lines.append(_line("idefics_jax.evaluate", *self.evaluation(number)))
        return lines


def read(given: str, workdir: str | None) -> Sweep:
    """Reads a sweep.

    Args:
      given: FILE[:argument].
      workdir: folder of all runs, or None for the sweep's own.

    Raises:
      UserError: the file has no `sweep()`, or what it returns is no sweep; or no folder is given.
    """
    file, _, argument = given.partition(":")
    returned = commands.call(file, "sweep")
    if not isinstance(returned, Mapping):
        raise UserError(f"sweep() of {file} returns a {type(returned).__name__}; it must return a dict with runs")
    config = settings.build(SweepConfig, returned, "sweep")
    if not (workdir or config.workdir):
        raise UserError(f"--workdir is missing, and sweep() of {file} names none")
    return Sweep(file, argument, (workdir or config.workdir).rstrip("/"), config)


def digits(number: int) -> str:
    """Returns a run's number as its folder is called."""
    return f"{number:03d}"


def _source(file: str, argument: str) -> str:
    return f"{file}:{argument}" if argument else file


def _line(module: str, *arguments: str) -> str:
    return shlex.join(["python", "-m", module, *arguments])
