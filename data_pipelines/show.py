"""Shows what is trained on: packed rows as a picture and as text, from the very batches that training would get.

    python -m data_pipelines.show --config configs/digits.py [--out rows.png] [--batches 4] [--shard 0]

Green text is trained on, grey is not; see shown_rows.py. Of each batch the rows of one virtual shard are made and
shown, as a whole batch of a pod takes tens of GiB.
"""

from pathlib import Path

from absl import flags

from data_pipelines import pipeline
from data_pipelines.shown_rows import as_text, draw
from idefics_jax import commands, settings
from idefics_jax.errors import UserError
from idefics_jax.processor import Processor

_CONFIG = commands.define_config(None, "a training config, configs/NAME.py[:argument]")
_OUT = flags.DEFINE_string("out", "rows.png", "picture to write")
_BATCHES = flags.DEFINE_integer("batches", 4, "batches of which rows are shown", lower_bound=1)
_SHARD = flags.DEFINE_integer("shard", 0, "virtual shard whose rows are shown, from 0", lower_bound=0)


def main() -> None:
    values = _CONFIG.value.to_dict()
    missing = [name for name in ("data", "processor", "image_rules") if name not in values]
    if missing:
        raise UserError(f"config.{missing[0]} is missing; give the config of a training")
    processor = Processor.load(values["processor"]).with_image_rules(values["image_rules"])
    config = settings.build(pipeline.DataConfig, pipeline.in_order(values["data"]), "config.data")
    if _SHARD.value >= config.virtual_shards:
        raise UserError(f"--shard is {_SHARD.value}; data.virtual_shards is {config.virtual_shards}, counted from 0")
    # The rows of a process that holds this shard alone.
    data = pipeline.batches(config, processor, process_index=_SHARD.value, process_count=config.virtual_shards)
    shown = [next(data).arrays for _ in range(_BATCHES.value)]
    for batch in shown:
        for row in range(len(batch["tokens"])):
            print(as_text(batch, row, processor, colour=True))
    try:
        draw(shown, processor, Path(_OUT.value))
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {_OUT.value} cannot be written ({error}); name a .png in a folder") from error
    print(f"picture in {_OUT.value}: green is trained on, grey is not, a colour for each document")


if __name__ == "__main__":
    commands.run(main, required=("config",))
