"""Shows what is trained on: packed rows as a picture and as text, from the very batches that training would get.

    python -m data_pipelines.show --config configs/digits.py [--out rows.png] [--batches 1]

Green text is trained on, grey is not; see shown_rows.py. A batch is made whole, and that of a pod takes tens of GiB:
`--config.data.shape.rows=2 --config.data.virtual_shards=2` shows the first rows that two shards would give.
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
_BATCHES = flags.DEFINE_integer("batches", 1, "batches shown", lower_bound=1)


def main() -> None:
    values = _CONFIG.value.to_dict()
    missing = [name for name in ("data", "processor", "image_rules") if name not in values]
    if missing:
        raise UserError(f"config.{missing[0]} is missing; give the config of a training")
    processor = Processor.load(values["processor"]).with_image_rules(values["image_rules"])
    config = settings.build(pipeline.DataConfig, pipeline.in_order(values["data"]), "config.data")
    data = pipeline.batches(config, processor, process_index=0, process_count=1)
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
