"""Trains a model.

    python -m idefics_jax.train --config configs/digits.py --workdir work/digits
    python -m idefics_jax.train --config configs/digits.py:lora --workdir work/lora --config.steps=500

The same command goes on with a run that was stopped. SIGTERM or Ctrl-C saves first, and ends with status 0, or with
what the variable IDEFICS_STOPPED_STATUS says.

    python -m idefics_jax.train --config configs/idefics2_8b/stage1.py --plan

prints what would train, and what it takes, without a weight. A run of several processes is one such command in each
(idefics_jax/processes.py says how they find each other; launch/processes.py starts them on this machine).
"""

from absl import flags, logging

from idefics_jax import buckets, commands, processes
from idefics_jax.errors import UserError

_CONFIG = commands.define_config(None, "what to train, configs/NAME.py[:argument]")
_WORKDIR = commands.define_folder("workdir", None, "folder of the run, or gs://BUCKET/FOLDER: checkpoints and model")
_PLAN = flags.DEFINE_boolean("plan", False, "print what would train, from shapes alone, and stop")


def main() -> None:
    logging.set_verbosity(logging.WARNING)
    # Imported here, so that a wrong flag is answered at once.
    from idefics_jax.training.config import TrainConfig
    from idefics_jax.training.loop import train
    from idefics_jax.training.plan import plan

    values = _CONFIG.value.to_dict()
    config = TrainConfig.from_config_dict(values)
    if _PLAN.value:
        print(plan(config))
        return
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing; see --help")
    workdir = buckets.absolute(_WORKDIR.value)
    with processes.joined():
        done = train(config, values, workdir)
    if not done:
        commands.end_stopped()


if __name__ == "__main__":
    commands.run(main, required=("config",))
