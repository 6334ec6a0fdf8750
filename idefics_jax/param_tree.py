"""A model's parameter tree: its shapes, logical axes and places without its arrays, and how it starts at random."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from idefics_jax.batch import BatchShape, batch_spec
from idefics_jax.config import Idefics2Config
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.sharding import logical_axes, tree_shardings, unbox


def probe_batch(config: Idefics2Config) -> dict[str, jax.Array]:
    """Returns the smallest batch that passes through every part: a row a device, as a mesh's constraints demand."""
    devices = jax.sharding.get_abstract_mesh().size
    shape = BatchShape(
        rows=max(1, devices), tokens=8, vision_rows=1, patches=8, images=1, patch_dim=config.vision_config.patch_dim
    )
    return {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in batch_spec(shape).items()}


def boxed_params(config: Idefics2Config, rng: jax.Array) -> dict[str, Any]:
    """Returns random parameters by the parts' own initialisation, each boxed with its logical axes."""
    # Through the logits, so that the head is there too.
    return Idefics2(config).init(rng, probe_batch(config), method=Idefics2.full_logits)["params"]


@functools.cache  # tracing the whole model takes longer than most of what asks for its shapes
def abstract_params(config: Idefics2Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parameters as float32 ShapeDtypeStructs, and their logical axes; nothing is allocated."""
    boxed = jax.eval_shape(lambda: boxed_params(config, jax.random.key(0)))
    return unbox(boxed), logical_axes(boxed)


def param_shapes(config: Idefics2Config) -> dict[str, Any]:
    """Returns the parameters as float32 ShapeDtypeStructs; nothing is allocated."""
    return abstract_params(config)[0]


def param_shardings(config: Idefics2Config, mesh: Mesh, rules: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the NamedSharding of every parameter.

    Args:
      config: the model.
      mesh: from sharding.make_mesh.
      rules: a preset of sharding.RULES.
    """
    return tree_shardings(mesh, abstract_params(config)[1], rules)
