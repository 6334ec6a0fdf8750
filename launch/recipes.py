"""Trains recipes one after another, each from the model that the one before it leaves.

    python -m launch.recipes --workdir work/idefics2_8b
    python -m launch.recipes --workdir work/mine --recipes mine/first.py,mine/second.py --override seed=1

Each is an ordinary `idefics_jax.train`, printed before it starts, in a folder of its own that has the recipe's name. A
recipe that has finished is not run again, so the same command goes on with what was stopped. Before the first one
starts, the settings of all are checked, those of a finished one against what it was trained with, and what the others
need is looked for: patterns that match, a mesh that fits, files that are there. A finished one whose model or position
in the data is gone writes it again from its checkpoint, unless the next has finished as well.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags
from etils import epath

from idefics_jax import commands
from idefics_jax.config import Idefics2Config
from idefics_jax.errors import UserError
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.loop import check_same_run
from idefics_jax.training.summary import SUMMARY_FILE
from launch import devices
from launch.finished import missing
from launch.rehearsal import rehearse

RECIPES = [f"configs/idefics2_8b/{name}.py" for name in ("stage1", "stage2", "instruct", "chat")]

_WORKDIR = commands.define_folder("workdir", None, "folder of all recipes, each in a folder inside")
_RECIPES = flags.DEFINE_list("recipes", RECIPES, "config files, in order")
_OVERRIDES = flags.DEFINE_multi_string("override", [], "NAME=VALUE: a setting given to every recipe; may be repeated")


def run(recipe: Path, folder: Path, overrides: list[str]) -> None:
    """Trains one recipe to its end.

    Args:
      recipe: its config file.
      folder: its work directory.
      overrides: settings as NAME=VALUE.

    Raises:
      UserError: it failed, or was stopped before its last step.
    """
    arguments = [f"--config={recipe}", f"--workdir={folder}", *(f"--config.{override}" for override in overrides)]
    print(f"$ python -m idefics_jax.train {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "idefics_jax.train", *arguments], check=False)
    if done.returncode or missing(folder):
        raise UserError(f"{recipe} has not finished; mend what it says above and run the same command again")


def trained(recipe: Path, folder: Path, *, used: bool) -> bool:
    """Whether a recipe has finished and left what is needed of it; says so.

    Args:
      recipe: its config file.
      folder: its work directory.
      used: whether the recipe after it has finished too, so that nothing else is needed of this one.

    Raises:
      UserError: something needed is gone, and there is no checkpoint to write it from.
    """
    lacking = missing(folder)
    if SUMMARY_FILE in lacking:
        return False
    gone = " and no ".join(lacking)
    if used or not gone:
        print(f"{recipe} is trained already: {folder}", flush=True)
        return True
    if not any(path.name.isdigit() for path in (folder / "checkpoints").glob("*")):
        raise UserError(
            f"{folder} has a {SUMMARY_FILE} but no {gone}, and no checkpoint to write them from; put them back from a "
            f"copy, or remove {folder} to train {recipe} again"
        )
    print(f"{folder} has no {gone} any more; {recipe} goes on from its last checkpoint", flush=True)
    return False


def check(recipe: Path, folder: Path, overrides: list[str]) -> TrainConfig:
    """Returns the settings; raises UserError unless they can be used and are those of the run the folder may hold."""
    values = commands.read_config(str(recipe), overrides).to_dict()
    with naming(recipe):
        config = TrainConfig.from_config_dict(values)
        check_same_run(values, epath.Path(folder))
        return config


def rehearse_all(left: Sequence[tuple[Path, Path, TrainConfig]], here: devices.Devices) -> None:
    """Rehearses what is to be trained, (recipe, folder, settings) of each, where each leaves its folder to the next.

    Raises:
      UserError: see `rehearse`.
    """
    written: dict[str, Idefics2Config] = {}
    for recipe, folder, config in left:
        with naming(recipe):
            written[str(folder)] = rehearse(config, epath.Path(folder), devices=here, written=written)


@contextlib.contextmanager
def naming(recipe: Path) -> Iterator[None]:
    """Puts the recipe's name before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{recipe}: {error}") from error


def run_all(recipes: list[Path], workdir: Path, overrides: list[str]) -> None:
    """Trains what has not finished yet, each but the first from the weights of the one before, going on in its data.

    Args:
      recipes: config files, in order.
      workdir: folder of all.
      overrides: settings of every recipe, as NAME=VALUE.

    Raises:
      UserError: see `check`, `trained`, `rehearse_all` and `run`, or there is no recipe, or two would share a folder.
    """
    folders = [workdir / recipe.stem for recipe in recipes]
    if not recipes or len(set(folders)) < len(folders):
        raise UserError(f"--recipes is {[str(recipe) for recipe in recipes]}; give at least one, each of its own name")
    starts = [[], *([f"init_from={folder}", f"data.after={folder}"] for folder in folders)]
    plans = [(*where, overrides + start) for *where, start in zip(recipes, folders, starts, strict=False)]
    configs = [check(*plan) for plan in plans]
    used = [*((after / SUMMARY_FILE).exists() for after in folders[1:]), False]
    left = [at for at, plan in enumerate(plans) if not trained(*plan[:2], used=used[at])]
    if left:
        rehearse_all([(*plans[at][:2], configs[at]) for at in left], devices.found())
    for at in left:
        run(*plans[at])


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # the devices are for the trainings
    run_all([Path(recipe) for recipe in _RECIPES.value], Path(_WORKDIR.value), _OVERRIDES.value)


if __name__ == "__main__":
    commands.run(main, required=("workdir",))
