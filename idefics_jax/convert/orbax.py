"""A model folder: what this port loads, trains from and leaves behind.

config.json             as Hugging Face writes it
params/                 the parameters, an Orbax checkpoint
fingerprint.json        sums of their leaves (fingerprint.py): Orbax itself does not notice a flipped bit
generation_config.json  as it came, if it came from Hugging Face
tokenizer.model, ...    the processor's files, if there is one
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from idefics_jax import full_disk
from idefics_jax.buckets import absolute
from idefics_jax.config import Idefics2Config
from idefics_jax.convert.hf import check_params
from idefics_jax.convert.staging import staged
from idefics_jax.errors import UserError
from idefics_jax.fingerprint import changed, fingerprint
from idefics_jax.processor import Processor

PARAMS, FINGERPRINT = "params", "fingerprint.json"


def is_model_folder(path: epath.Path) -> bool:
    """Whether a folder holds a model in this form."""
    return (path / PARAMS).is_dir() and (path / "config.json").exists()


def save_model(
    path: epath.PathLike,
    params: Mapping[str, Any],
    config: Idefics2Config,
    processor: Processor | None,
    *,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model folder, whole or not at all; a model folder that is there already gives way.

    With several processes all of them call it, each holding its part of sharded parameters. While Orbax writes, it
    keeps a second copy of that part in the host's memory.

    Args:
      path: the folder.
      params: nested dict of numpy or JAX arrays, written in their dtypes.
      config: the model's.
      processor: written beside the weights, or None.
      generation_config: content of generation_config.json, or None for none.

    Raises:
      UserError: the params are not the config's, `path` holds something else, or it cannot be written.
    """
    check_params(params, config)
    full_disk.check_room(path, params)
    full_disk.say_once()
    sums = fingerprint(params)
    with staged(path, replace=is_model_folder(epath.Path(path))) as folder:
        try:
            # Weights hardly compress, and compressing them holds another copy of them in memory.
            ocp.PyTreeCheckpointer(use_compression=False).save(folder / PARAMS, params)
        except ValueError as error:  # tensorstore's word for a full disk
            raise full_disk.os_error(error) or error from error
        if jax.process_index() == 0:
            (folder / FINGERPRINT).write_text(json.dumps(sums, indent=2) + "\n")
            if generation_config is not None:
                (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
            if processor is not None:
                processor.save(folder)
            # Last: without it the folder is no model's.
            (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")


def load_model(path: epath.PathLike, *, shardings: Any = None) -> tuple[dict[str, Any], Idefics2Config]:
    """Reads a model folder.

    Args:
      path: the folder.
      shardings: where each parameter goes, a tree like the parameters (tree.param_shardings); None = all of them on
        the first device.

    Returns:
      The parameters as JAX arrays in the dtypes they were saved in, and the config.

    Raises:
      UserError: there is no model folder, it is damaged, or its weights are not its config's.
    """
    path = epath.Path(path)
    config = Idefics2Config.load(path)
    shapes = model_shapes(path)
    check_params(shapes, config)
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: first, shapes)
    wanted = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    with _named(path):
        params = ocp.PyTreeCheckpointer().restore(absolute(path) / PARAMS, item=wanted, restore_args=arguments)
        damaged = changed(params, json.loads((path / FINGERPRINT).read_text()))
    if damaged:
        raise UserError(
            f"{path / PARAMS} is damaged: {damaged[0]} and {len(damaged) - 1} more leaves are not what was saved; "
            "convert or train the model again"
        )
    return params, config


def model_shapes(path: epath.PathLike) -> dict[str, Any]:
    """Returns the parameters of a model folder as ShapeDtypeStructs; no weight is read.

    Raises:
      UserError: there is no model folder, or its description is damaged.
    """
    path = epath.Path(path)
    if not is_model_folder(path):
        raise UserError(f"{path} holds no config.json and {PARAMS}; give a folder written by from-hf or by training")
    with _named(path):
        found = ocp.PyTreeCheckpointer().metadata(absolute(path) / PARAMS).item_metadata.tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found)


@contextlib.contextmanager
def _named(path: epath.Path) -> Iterator[None]:
    """Turns what Orbax raises on a damaged checkpoint, types of its own among it, into one sentence."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path / PARAMS} cannot be read, a part of it is missing or damaged; convert or train the model again"
        ) from error
