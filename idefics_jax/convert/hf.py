"""Hugging Face's tensors to our parameters and back, by the table of rules.py.

Both directions go leaf by leaf and keep every bit and every dtype. Where the tensors come from is not said here: any
mapping from names to arrays will do, a folder that is read as it is asked (hf_folder.py) included.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from idefics_jax.config import Idefics2Config
from idefics_jax.convert.rules import EMBEDDING, HEAD, Leaf, leaves
from idefics_jax.errors import UserError
from idefics_jax.param_transforms.paths import flatten, unflatten

Shape = tuple[int, ...]


def from_hf(tensors: Mapping[str, Any], config: Idefics2Config) -> dict[str, Any]:
    """Returns our parameters from Hugging Face's tensors.

    Args:
      tensors: name -> array; each is read once, and needs only `.shape` and what `np.asarray` needs.
      config: the model they belong to.

    Returns:
      The nested dict that `Idefics2(config).init` gives under "params", as numpy arrays in the tensors' own dtypes.

    Raises:
      UserError: a tensor is missing, unexpected or mis-shaped (all are listed, before any is read), or the layers of
        a family differ in dtype.
    """
    return unflatten(dict(iter_from_hf(tensors, config)))


def iter_from_hf(
    tensors: Mapping[str, Any], config: Idefics2Config, *, part: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields ("a/b/c", array) of `from_hf` one leaf at a time, for a caller with no room for a second copy.

    With a `part` ("vision_model"), the tensors are that part's alone, and so is what comes of them.
    """
    wanted = [leaf for leaf in leaves(config) if not part or leaf.rule.ours.startswith(f"{part}/")]
    tied = config.tie_word_embeddings and HEAD in tensors
    _check_names({name for leaf in wanted for name in leaf.names}, set(tensors) - ({HEAD} if tied else set()))
    _check_shapes((name, tuple(tensors[name].shape), leaf.hf_shape) for leaf in wanted for name in leaf.names)
    if tied:
        _check_tied(np.asarray(tensors[HEAD]), np.asarray(tensors[EMBEDDING]))
    for leaf in wanted:
        yield leaf.rule.ours, _read(tensors, leaf)


def to_hf(params: Mapping[str, Any], config: Idefics2Config) -> dict[str, np.ndarray]:
    """Returns Hugging Face's tensors from our parameters: the inverse of `from_hf`.

    Args:
      params: nested dict of numpy or JAX arrays.
      config: the model they belong to.

    Raises:
      UserError: a parameter is missing, unexpected or mis-shaped; all are listed.
    """
    return dict(iter_to_hf(params, config))


def iter_to_hf(params: Mapping[str, Any], config: Idefics2Config) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, contiguous array) of `to_hf` one tensor at a time."""
    check_params(params, config)
    flat = flatten(params)
    for leaf in leaves(config):
        array = np.asarray(flat[leaf.rule.ours])
        for i, name in enumerate(leaf.names):
            yield name, np.ascontiguousarray(leaf.rule.op.to_hf(array[i] if leaf.rule.stacked else array))


def check_params(params: Mapping[str, Any], config: Idefics2Config) -> None:
    """Raises UserError unless a tree of arrays (or shapes) is that of the config; all differences are listed."""
    flat, wanted = flatten(params), leaves(config)
    _check_names({leaf.rule.ours for leaf in wanted}, set(flat))
    _check_shapes((leaf.rule.ours, tuple(flat[leaf.rule.ours].shape), leaf.shape) for leaf in wanted)


def _check_names(wanted: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(wanted - found), sorted(found - wanted)
    if missing or unexpected:
        raise UserError(
            "the weights are not those that config.json describes, give the two that belong together; "
            f"missing ({len(missing)}): {', '.join(missing) or 'none'}; "
            f"unexpected ({len(unexpected)}): {', '.join(unexpected) or 'none'}"
        )


def _check_shapes(found_and_wanted: Iterable[tuple[str, Shape, Shape]]) -> None:
    wrong = [
        f"{name} is {list(found)} and should be {list(wanted)}"
        for name, found, wanted in found_and_wanted
        if found != wanted
    ]
    if wrong:
        raise UserError(
            "the weights are not of the sizes that config.json gives, give the two that belong together; "
            f"mis-shaped ({len(wrong)}): {', '.join(sorted(wrong))}"
        )


def _check_tied(head: np.ndarray, embedding: np.ndarray) -> None:
    if head.dtype != embedding.dtype or head.tobytes() != embedding.tobytes():
        raise UserError(
            f"{HEAD} differs from {EMBEDDING} although config.json ties them; set tie_word_embeddings to false"
        )


def _read(tensors: Mapping[str, Any], leaf: Leaf) -> np.ndarray:
    """Reads the tensors of one leaf; a stack is filled layer by layer."""
    to_ours = leaf.rule.op.to_ours
    if not leaf.rule.stacked:
        return np.ascontiguousarray(to_ours(np.asarray(tensors[leaf.names[0]])))
    first = to_ours(np.asarray(tensors[leaf.names[0]]))
    stack = np.empty(leaf.shape, first.dtype)
    stack[0] = first
    for i, name in enumerate(leaf.names[1:], start=1):
        layer = to_ours(np.asarray(tensors[name]))
        if layer.dtype != stack.dtype:
            raise UserError(f"{name} is {layer.dtype} and {leaf.names[0]} {stack.dtype}; save all layers in one dtype")
        stack[i] = layer
    return stack
