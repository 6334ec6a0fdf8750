"""Trains recipes one after another, each from the model that the one before it leaves.

    python -m launch.recipes --workdir work/idefics2_8b
    python -m launch.recipes --workdir work/mine --recipes mine/first.py,mine/second.py --override seed=1

Each is an ordinary `idefics_jax.train`, printed before it starts, in a folder of its own that has the recipe's name. A
recipe that has finished is not run again, so the same command goes on with what was stopped.
"""

import subprocess
import sys
from pathlib import Path

from absl import flags

from idefics_jax import commands
from idefics_jax.errors import UserError
from idefics_jax.training.summary import SUMMARY_FILE

RECIPES = [f"configs/idefics2_8b/{name}.py" for name in ("stage1", "stage2", "instruct", "chat")]

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of all recipes, each in a folder inside")
_RECIPES = flags.DEFINE_list("recipes", RECIPES, "config files, in order")
_OVERRIDES = flags.DEFINE_multi_string("override", [], "NAME=VALUE: a setting given to every recipe; may be repeated")


def run(recipe: Path, folder: Path, start: Path | None, overrides: list[str]) -> None:
    """Trains one recipe to its end.

    Args:
      recipe: its config file.
      folder: its work directory.
      start: work directory of the recipe before it; None leaves the start to the config.
      overrides: settings as NAME=VALUE.

    Raises:
      UserError: it failed, or was stopped before its last step.
    """
    arguments = [f"--config={recipe}", f"--workdir={folder}", *(f"--config.{override}" for override in overrides)]
    if start is not None:
        arguments.append(f"--config.init_from={start}")
    print(f"$ python -m idefics_jax.train {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "idefics_jax.train", *arguments], check=False)
    if done.returncode or not (folder / SUMMARY_FILE).exists():
        raise UserError(f"{recipe} has not finished; mend what it says above and run the same command again")


def main() -> None:
    recipes = [Path(recipe) for recipe in _RECIPES.value]
    folders = [Path(_WORKDIR.value, recipe.stem) for recipe in recipes]
    if len(set(folders)) < len(folders):
        raise UserError(f"--recipes has two files of one name ({_RECIPES.value}); rename one")
    for recipe, folder, start in zip(recipes, folders, [None, *folders], strict=False):
        if (folder / SUMMARY_FILE).exists():
            print(f"{recipe} is trained already: {folder}", flush=True)
        else:
            run(recipe, folder, start, _OVERRIDES.value)


if __name__ == "__main__":
    commands.run(main, required=("workdir",))
