"""Trains a model.

    python -m idefics_jax.train --config configs/digits.py --workdir work/digits
    python -m idefics_jax.train --config configs/digits.py:lora --workdir work/lora --config.steps=500

The same command goes on with a run that was stopped.
"""

from absl import flags, logging
from etils import epath

from idefics_jax import commands

_CONFIG = commands.define_config(None, "what to train, configs/NAME.py[:argument]")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, the trained model")


def main() -> None:
    logging.set_verbosity(logging.WARNING)
    # Imported here, so that a wrong flag is answered at once.
    from idefics_jax.training.config import TrainConfig
    from idefics_jax.training.loop import train

    values = _CONFIG.value.to_dict()
    train(TrainConfig.from_config_dict(values), values, epath.Path(_WORKDIR.value).resolve())


if __name__ == "__main__":
    commands.run(main, required=("config", "workdir"))
