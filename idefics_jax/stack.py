"""A stack of equal layers as one scanned layer: the only place with `nn.scan` and `nn.remat`.

Parameters of a stack have a leading `layers` axis; the program holds one layer, so compile time does not grow with
depth. What the backward pass keeps is chosen by name.

A scan copies each layer's weights out of the stack every time it runs. Beside the arithmetic of many tokens that is
nothing, but a step of decoding does little else than read weights: it may run the layers `unrolled`, their parameters
cut apart once.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from idefics_jax.flash_attention import OPERANDS, SAVED

policies = jax.checkpoint_policies

# What is saved for the backward pass, from most memory to least; None recomputes nothing. "linear" keeps what each
# Linear gives with its side path added: to keep every product, as is usual, is twice the memory and slower under LoRA.
# Of queries, keys and values it keeps what a TPU's kernel of attention takes: rotated, and in its layout.
# "attention" keeps what the kernel of attention takes and gives: neither it nor the products before it run twice.
# Without the kernel there is nothing of these names, and it is "full".
REMAT_POLICIES = {
    "none": None,
    "linear": policies.save_only_these_names("linear", "lora", OPERANDS, SAVED),
    "attention": policies.save_only_these_names(OPERANDS, SAVED),
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
        variable_axes={"params": 0, "adapters": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def unrolled(block: type[nn.Module], *, length: int) -> Callable[..., nn.Module]:
    """Returns `block` applied `length` times in a row, for inference: built and called as what `stack` returns.

    `per_layer`, and what comes back for it, is a tuple of L trees; parameters are named as `unrolled_params` does.
    """
    return lambda *args, **kwargs: _Unrolled(block, args, length, **kwargs)


class _Unrolled(nn.Module):
    block: type[nn.Module]
    args: tuple[Any, ...]
    length: int

    @nn.compact
    def __call__(self, x: Any, shared: Any, per_layer: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        out = []
        for i in range(self.length):
            x, own = self.block(*self.args, name=str(i))(x, shared, per_layer[i])
            out.append(own)
        return x, tuple(out)


def unrolled_params(stacked: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a stack as those of its unrolled form: {"0": the first layer's, "1": ...}."""
    return {str(i): layer for i, layer in enumerate(unstack(stacked))}


def unstack(tree: Any) -> tuple[Any, ...]:
    """Cuts a tree along the leading axis of its leaves into L trees without it."""
    leaves, structure = jax.tree.flatten(tree)
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*leaves, strict=True))
