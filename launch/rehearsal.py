"""What would stop a training before its first step, found while none is running yet.

It is looked for in the settings, in shapes, and in the names of files: no weight is made or read, no device is taken.
"""

from collections.abc import Mapping

from etils import epath

from data_pipelines import pipeline, position
from idefics_jax.config import Idefics2Config
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.initial import check_weights, load_processor, model_config
from idefics_jax.training.loop import with_kept_start
from idefics_jax.training.plan import plan
from idefics_jax.training.run import device_rows
from launch.devices import Devices


def rehearse(
    config: TrainConfig, workdir: epath.Path, *, devices: Devices, written: Mapping[str, Idefics2Config]
) -> Idefics2Config:
    """Looks at everything that a training needs.

    Args:
      config: its settings.
      workdir: its work directory, which may hold what a stopped one left.
      devices: those that it will have.
      written: work directories that trainings before it will leave, and the sizes of their models.

    Returns:
      The sizes of the model that it leaves.

    Raises:
      UserError: the processor, weights or data files are not there or do not fit, a pattern matches nothing, nothing
        would train, or the mesh or the rows do not fit the devices.
    """
    start = written.get(config.init_from)
    processor = load_processor(config)
    sizes = model_config(config, processor, start=start)
    check_weights(config, sizes, start=start)
    plan(config, start=start)
    device_rows(devices.mesh(config.mesh), config.data.shape.rows)
    data = with_kept_start(config.data, workdir)
    pipeline.check_files(data, processor)
    if data.after and data.after not in written:
        position.identity(data.after)
    return sizes
