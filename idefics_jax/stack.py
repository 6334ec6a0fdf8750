"""A stack of equal layers as one scanned layer: the only place with `nn.scan` and `nn.remat`.

Parameters of a stack have a leading `layers` axis; the program holds one layer, so compile time does not grow with
depth. What the backward pass keeps is chosen by name.
"""

import flax.linen as nn
import jax

policies = jax.checkpoint_policies

# What is saved for the backward pass, from most memory to least; None recomputes nothing.
REMAT_POLICIES = {
    "none": None,
    "dots": policies.dots_with_no_batch_dims_saveable,
    "full": policies.nothing_saveable,
}


def stack(block: type[nn.Module], *, length: int, remat: str) -> type[nn.Module]:
    """Returns `block` scanned over `length` layers.

    The block is called as `block(...)(x, shared, per_layer) -> (x, per_layer_out)`: `shared` (any tree) goes to every
    layer, `per_layer` (a tree with a leading layer axis, or None) is cut along it.

    Args:
      block: the layer's module class.
      length: L, number of layers.
      remat: name in REMAT_POLICIES.

    Raises:
      ValueError: there is no policy of that name.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat is {remat!r}; choose one of {', '.join(REMAT_POLICIES)}")
    if REMAT_POLICIES[remat] is not None:
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
