"""A loaded model: `idefics_jax.load(folder)`."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from idefics_jax import buckets
from idefics_jax.batch import Batch, check_image_tokens
from idefics_jax.config import Idefics2Config
from idefics_jax.convert.hf import iter_from_hf
from idefics_jax.convert.hf_folder import HfFolder, is_hf_folder
from idefics_jax.convert.orbax import is_model_folder, load_model
from idefics_jax.errors import UserError
from idefics_jax.layers import Dtype
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.param_transforms.paths import flatten, unflatten
from idefics_jax.param_tree import param_shapes, param_shardings
from idefics_jax.processor import Processor
from idefics_jax.sharding import RULES, make_mesh, use_mesh

# Where training leaves its model in a work directory.
MODEL_IN_WORKDIR = "model"
# And the adapter of a run that has one, in PEFT's form.
ADAPTER_IN_WORKDIR = "adapter"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Model:
    """Parameters with all that is needed to run them.

    Attributes:
      config: sizes.
      params: nested dict of JAX arrays, the tree of `Idefics2(config).init`.
      processor: the one found beside the weights, or None.
      dtype: dtype of the arithmetic.
      mesh: the devices that the parameters lie on.
      rules: how they are spread over it, a preset of sharding.RULES.
    """

    config: Idefics2Config
    params: dict[str, Any]
    processor: Processor | None
    dtype: Dtype
    mesh: Mesh
    rules: Mapping[str, Any]

    def __call__(self, batch: Batch) -> jax.Array:
        """Returns the logits, float32 [B, T, V], of a batch (idefics_jax/batch.py); compiled once a shape.

        Raises:
          UserError: see `check_batch`.
        """
        check_batch(self.config, batch)
        with use_mesh(self.mesh, self.rules):
            return _logits(Idefics2(self.config, self.dtype), self.params, dict(batch))

    def __repr__(self) -> str:
        config, leaves = self.config, flatten(self.params).values()
        dtypes = sorted({leaf.dtype.name for leaf in leaves})
        return (
            f"Idefics2 of {sum(leaf.size for leaf in leaves):,} {'/'.join(dtypes)} parameters on "
            f"{self.mesh.size} {self.mesh.devices.flat[0].device_kind} device(s): "
            f"vision {config.vision_config.num_hidden_layers} x {config.vision_config.hidden_size}, "
            f"resampler {config.perceiver_config.resampler_depth} x {config.perceiver_config.hidden_size} "
            f"with {config.perceiver_config.resampler_n_latents} latents, "
            f"decoder {config.text_config.num_hidden_layers} x {config.text_config.hidden_size}, "
            f"vocabulary {config.text_config.vocab_size:,}, {'with' if self.processor else 'no'} processor"
        )


def check_batch(config: Idefics2Config, batch: Batch) -> None:
    """Raises UserError for what the program would not notice: unknown ids, and other `<image>`s than images."""
    if not all(getattr(x, "is_fully_addressable", True) for x in batch.values()):
        return  # rows of other processes are theirs to look at
    tokens = np.asarray(batch["tokens"])
    if tokens.min() < 0 or tokens.max() >= config.text_config.vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise UserError(f"tokens holds {wrong}; the ids of this model are 0 to {config.text_config.vocab_size - 1}")
    latents = config.perceiver_config.resampler_n_latents
    images = np.asarray(batch["image_mask"]).sum(axis=1) if "patches" in batch else np.zeros(len(tokens), int)
    check_image_tokens(tokens == config.image_token_id, images, latents)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Idefics2, params: dict[str, Any], batch: Batch) -> jax.Array:
    return model.apply({"params": params}, batch, method="full_logits")


def load(
    path: epath.PathLike,
    *,
    dtype: Dtype = jnp.float32,
    mesh: Mesh | None = None,
    rules: Mapping[str, Any] | None = None,
) -> Model:
    """Loads a model.

    Args:
      path: a Hugging Face folder with safetensors, a model folder (convert from-hf), or a work directory of training.
      dtype: dtype of the arithmetic; the parameters keep that of their file.
      mesh: the devices to spread it over (sharding.make_mesh); by default the first one alone.
      rules: how (a preset of sharding.RULES); by default a copy on each device.

    Raises:
      UserError: the folder holds no model, or a damaged one.
    """
    path = find_model(path)
    config = Idefics2Config.load(path)
    mesh = make_mesh({}, jax.local_devices()[:1]) if mesh is None else mesh
    rules = RULES["data"] if rules is None else rules
    shardings = param_shardings(config, mesh, rules)
    check_cut(config, shardings)
    if is_model_folder(path):
        params, _ = load_model(path, shardings=shardings)
    else:
        params = place(iter_from_hf(HfFolder(path), config), shardings)
    return Model(config, params, load_processor(path), dtype, mesh, rules)


def cut_over(devices: int) -> dict[str, Any]:
    """Returns `mesh` and `rules` of `load` for a model whose layers are cut over this process's first devices.

    Raises:
      UserError: there are fewer.
    """
    mesh = make_mesh({"tensor": devices}, jax.local_devices()[:devices])
    return {"mesh": mesh, "rules": RULES["fsdp_tensor"]}


def check_cut(config: Idefics2Config, shardings: dict[str, Any]) -> None:
    """Raises UserError where a parameter cannot be cut into as many equal parts as its place asks for."""
    where = flatten(shardings)
    for path, leaf in flatten(param_shapes(config)).items():
        try:
            where[path].shard_shape(leaf.shape)
        except ValueError as error:
            mesh = ", ".join(f"{axis} {size}" for axis, size in where[path].mesh.shape.items() if size > 1)
            raise UserError(f"{path} of shape {leaf.shape} cannot be cut over {mesh}; take fewer devices") from error


def find_model(path: epath.PathLike) -> epath.Path:
    """Returns the folder that holds the model of `path`: itself, or its `model` where it is a work directory."""
    buckets.check(path)
    path = epath.Path(path).expanduser()
    inner = path / MODEL_IN_WORKDIR
    if is_model_folder(path) or is_hf_folder(path):
        return path
    if is_model_folder(inner):
        return inner
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a Hugging Face folder, a model folder or a work directory")
    raise UserError(
        f"{path} holds no model: no safetensors, no params, and no finished {MODEL_IN_WORKDIR}; give a Hugging Face "
        "folder, a model folder or the work directory of a finished training"
    )


def load_processor(path: epath.Path) -> Processor | None:
    """Returns the processor of a folder, or None where there is none; raises UserError if it is damaged."""
    there = any((path / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    return Processor.load(path) if there else None


def place(leaves: Iterable[tuple[str, Any]], shardings: dict[str, Any]) -> dict[str, Any]:
    """Puts ("a/b/c", array) after another on its devices, so that the host never holds the whole."""
    where = flatten(shardings)
    return unflatten(
        {path: jax.make_array_from_callback(array.shape, where[path], array.__getitem__) for path, array in leaves}
    )
