"""The parameter tree of a config without its arrays: shapes, shardings, paths."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from idefics_jax.batch import BatchShape, batch_spec
from idefics_jax.config import Idefics2Config
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.sharding import logical_axes, tree_shardings, unbox


def param_shapes(config: Idefics2Config) -> dict[str, Any]:
    """Returns the nested dict of a model's parameters as float32 ShapeDtypeStructs; nothing is allocated."""
    return unbox(_boxed(config))


def param_shardings(config: Idefics2Config, mesh: Mesh, rules: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the NamedSharding of every parameter.

    Args:
      config: the model.
      mesh: from sharding.make_mesh.
      rules: a preset of sharding.RULES.
    """
    return tree_shardings(mesh, logical_axes(_boxed(config)), rules)


def _boxed(config: Idefics2Config) -> dict[str, Any]:
    shape = BatchShape(rows=1, tokens=1, vision_rows=1, patches=1, images=1, patch_dim=config.vision_config.patch_dim)
    init = Idefics2(config).init
    # Through the logits, so that the head is there too.
    trace = jax.eval_shape(lambda rng, x: init(rng, x, method="full_logits"), jax.random.key(0), batch_spec(shape))
    return trace["params"]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"a/b/c": leaf} of a nested dict."""
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths_and_leaves}


def insert(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Puts a leaf into a nested dict at "a/b/c"."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf
