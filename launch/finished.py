"""What a training that has finished leaves in its work directory."""

from pathlib import Path

from etils import epath

from data_pipelines import position
from idefics_jax.convert.orbax import is_model_folder
from idefics_jax.model import MODEL_IN_WORKDIR
from idefics_jax.training.summary import SUMMARY_FILE


def missing(folder: Path) -> list[str]:
    """Returns what a finished training has in its work directory and this one lacks."""
    there = {
        SUMMARY_FILE: (folder / SUMMARY_FILE).exists(),
        MODEL_IN_WORKDIR: is_model_folder(epath.Path(folder / MODEL_IN_WORKDIR)),
        position.FOLDER: position.is_written(epath.Path(folder / position.FOLDER)),
    }
    return [name for name, found in there.items() if not found]


def is_trained(folder: Path, *, used: bool) -> bool:
    """Whether a training has finished, and its model is still there where it is `used`."""
    lacking = missing(folder)
    return SUMMARY_FILE not in lacking and not (used and MODEL_IN_WORKDIR in lacking)
