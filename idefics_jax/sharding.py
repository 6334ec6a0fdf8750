"""Where arrays live: the mesh, and one table from logical axis names to mesh axes.

Parameters and activations carry logical names (t5x's words); a preset of RULES says which mesh axis each name is
cut along. One device is a mesh too, so there is one code path. `use_mesh` is the only way in: `with mesh:` silently
drops every constraint in this Flax.

    data           every device holds all parameters and its own rows; gradients of what trains are summed
    fsdp           parameters are cut over `fsdp` and gathered, layer by layer, where they are used
    fsdp_tensor    and within a layer over `tensor`: heads, widths between products, logits

Each goes with any number of slices: the mesh's first axis is one more along which rows are dealt out.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from idefics_jax.errors import UserError

# From the slowest network to the fastest: slices are joined by the data centre's, all else by the links between chips.
# Only gradients of what trains pass between slices, and between groups along `data`.
MESH_AXES = ("slice", "data", "fsdp", "tensor")
_ROWS = ("slice", "data", "fsdp")

_ACTIVATIONS = {
    "act_batch": _ROWS,
    "act_length": None,
    "act_patches": None,
    "act_embed": None,
    "act_vocab": None,
}
_REPLICATED = {
    "layers": None,
    "embed": None,
    "mlp": None,
    "heads": None,
    "kv_heads": None,
    "vocab": None,
    "rank": None,
    "latents": None,
    "patch": None,
    "position": None,
    "vision_embed": None,
    "vision_heads": None,
    "vision_mlp": None,
}
_FSDP = {**_REPLICATED, "embed": "fsdp", "vision_embed": "fsdp"}
RULES: dict[str, dict[str, Any]] = {
    "data": {**_REPLICATED, **_ACTIVATIONS},
    "fsdp": {**_FSDP, **_ACTIVATIONS},
    "fsdp_tensor": {
        **_FSDP,
        **_ACTIVATIONS,
        # Not vocab: the released vocabulary, 32,003, is prime, so no number of devices divides it. Logits are cut all
        # the same (training/losses.py), each device then taking its columns of a head that all of them have.
        "act_vocab": "tensor",
        **dict.fromkeys(("mlp", "heads", "kv_heads", "vision_heads", "vision_mlp"), "tensor"),
    },
}


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh; a size of -1 takes what the other axes leave.

    Args:
      sizes: size of each of MESH_AXES; an axis left out has size 1, and `slice` as many as the devices lie in.
      devices: the devices to use, by default all.

    Raises:
      UserError: an unknown axis, more than one -1, sizes that do not multiply to the number of devices, or another
        number of slices than there are.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = mesh_shape(sizes, len(devices), slices)
    return Mesh(_arranged(devices, shape, slices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_shape(sizes: Mapping[str, int], devices: int, slices: int) -> list[int]:
    """Returns the size of each of MESH_AXES over so many devices in so many slices; see `make_mesh`."""
    sizes = {"slice": slices, **sizes}
    fixed = fixed_devices(sizes)
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if -1 in shape:
        shape[shape.index(-1)] = devices // fixed
    if math.prod(shape) != devices:
        raise UserError(f"mesh sizes {dict(sizes)} do not fit {devices} device(s); their product must be that")
    if slices > 1 and shape[0] != slices:
        raise UserError(f"mesh.slice is {shape[0]}, and the devices lie in {slices} slices; leave it out")
    return shape


def _arranged(devices: list[jax.Device], shape: list[int], slices: int) -> np.ndarray:
    """Returns the devices in the mesh's shape: on TPU so that an axis runs along links, and slices lie apart."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )


def fixed_devices(sizes: Mapping[str, int]) -> int:
    """Returns how many devices a mesh takes, or with a -1 among its sizes, what their number must be a multiple of.

    Raises:
      UserError: an unknown axis, more than one -1, or another size below 1.
    """
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise UserError(f"mesh axis {unknown[0]!r} is unknown; the axes are {', '.join(MESH_AXES)}")
    given = [size for size in sizes.values() if size != -1]
    if len(sizes) - len(given) > 1 or any(size < 1 for size in given):
        raise UserError(f"mesh sizes {dict(sizes)} need whole numbers of at least 1, and at most one -1")
    return math.prod(given)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Mapping[str, Any]) -> Iterator[Mesh]:
    """Makes mesh and rules current, for parameters and constraints alike."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.items())):
        yield mesh


def spec(names: tuple[str | None, ...], rules: Mapping[str, Any]) -> PartitionSpec:
    """Translates the logical names of one array.

    Raises:
      ValueError: a name that the table lacks, or two dims cut along the same mesh axis.
    """
    axes = []
    used: dict[str, str] = {}
    for name in names:
        if name is not None and name not in rules:
            raise ValueError(f"logical axis {name!r} is not in the sharding rules; add it to sharding.RULES")
        axis = rules.get(name)
        for mesh_axis in (axis,) if isinstance(axis, str) else axis or ():
            if mesh_axis in used:
                raise ValueError(
                    f"logical axes {used[mesh_axis]!r} and {name!r} of one array both map to mesh axis "
                    f"{mesh_axis!r}; change one of the two in sharding.RULES"
                )
            used[mesh_axis] = name
        axes.append(axis)
    return PartitionSpec(*axes)


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Lays an activation out by its logical names; outside `use_mesh` returns it as it is.

    Raises:
      ValueError: as `spec`. Flax's own nn.with_logical_constraint leaves a dim it cannot place unsharded, silently.
    """
    rules = nn.get_logical_axis_rules()
    return jax.lax.with_sharding_constraint(x, spec(names, dict(rules))) if rules else x


def mesh_axes(name: str, length: int) -> tuple[str, ...]:
    """Returns the axes of the current mesh that a dim of this name and length is cut along.

    Outside `use_mesh`, or where the devices along them do not divide the length, none. An axis of one device cuts
    nothing, and XLA's partitioner refuses a collective along such axes alone.
    """
    rules = dict(nn.get_logical_axis_rules())
    axes = spec((name,), rules)[0] if rules else None
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if sizes[axis] > 1)
    return axes if length % math.prod(sizes[axis] for axis in axes) == 0 else ()


def logical_axes(boxed: Any) -> Any:
    """Returns the tree of logical names of a tree of boxed parameters, as `init` or `eval_shape` gives it."""
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def unbox(boxed: Any) -> Any:
    """Returns the plain tree of arrays (or shapes) of a boxed tree.

    Unlike flax's, it adds no sharding constraint, so it works on shapes while a mesh is current.
    """
    return jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def tree_shardings(mesh: Mesh, axes: Any, rules: Mapping[str, Any]) -> Any:
    """Returns the NamedSharding of every leaf, from its logical names."""
    return jax.tree.map(lambda names: NamedSharding(mesh, spec(names, rules)), axes, is_leaf=is_names)


def is_names(x: Any) -> bool:
    """Whether x is one array's tuple of logical names; a NamedTuple of an optimizer's state is not."""
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows of a batch are spread over every axis but `tensor`."""
    return NamedSharding(mesh, PartitionSpec(_ROWS))


def table(mesh: Mesh, shapes: Mapping[str, Any], axes: Mapping[str, Any], rules: Mapping[str, Any]) -> str:
    """Returns a line for every leaf, with their sum: where it lies and what it takes of each device.

    Args:
      mesh: from make_mesh.
      shapes: {path: array or shape}.
      axes: {path: logical names}.
      rules: a preset of RULES.

    Returns:
      Columns path, shape, logical axes, spec, MiB on each device.
    """
    rows, total = [("parameter", "shape", "logical axes", "spec", "MiB a device")], 0
    for path, leaf in shapes.items():
        placed = NamedSharding(mesh, spec(axes[path], rules))
        size = math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        names, cut = (", ".join(map(_word, part)) for part in (axes[path], placed.spec))
        rows.append((path, "x".join(map(str, leaf.shape)), names, cut, f"{size / 2**20:.3f}"))
        total += size
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return "\n".join([*lines, f"{total / 2**20:,.1f} MiB on each of {mesh.size} device(s): {sizes}"])


def _word(axis: Any) -> str:
    return "-" if axis is None else axis if isinstance(axis, str) else "+".join(axis)
