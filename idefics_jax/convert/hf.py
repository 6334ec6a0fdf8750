"""Hugging Face's tensors to our parameters and back, by the table of rules.py.

Both directions go leaf by leaf and keep every bit and every dtype. Where the tensors come from is not said here: any
mapping from names to arrays will do, a lazily read folder (safetensors.py) included.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from idefics_jax.config import Idefics2Config
from idefics_jax.convert.rules import EMBEDDING, HEAD, Leaf, flatten, insert, leaves


class ConversionError(ValueError):
    """Weights that cannot be converted; the message names the tensor or file and the mend."""


def from_hf(tensors: Mapping[str, Any], config: Idefics2Config) -> dict[str, Any]:
    """Returns our parameters from Hugging Face's tensors.

    Args:
      tensors: name -> array; each is read once, and needs only `.shape` and `np.asarray`.
      config: the model they belong to.

    Returns:
      The nested dict that `Idefics2(config).init` gives under "params", as numpy arrays in the tensors' own dtypes.

    Raises:
      ConversionError: a tensor is missing, unexpected or mis-shaped (all of them are listed, before any is read), or
        the layers of one family differ in dtype.
    """
    params: dict[str, Any] = {}
    for path, array in iter_from_hf(tensors, config):
        insert(params, path, array)
    return params


def iter_from_hf(tensors: Mapping[str, Any], config: Idefics2Config) -> Iterator[tuple[str, np.ndarray]]:
    """Yields ("a/b/c", array) of `from_hf` one leaf at a time, for a caller that cannot hold two copies of a model."""
    wanted = leaves(config)
    check_names(tensors, wanted, tied=config.tie_word_embeddings)
    if config.tie_word_embeddings and HEAD in tensors:
        _check_tied(tensors)
    for leaf in wanted:
        yield leaf.rule.ours, _read(tensors, leaf)


def to_hf(params: Mapping[str, Any], config: Idefics2Config) -> dict[str, np.ndarray]:
    """Returns Hugging Face's tensors from our parameters: the inverse of `from_hf`.

    Args:
      params: nested dict of numpy or JAX arrays.
      config: the model they belong to.

    Raises:
      ConversionError: a parameter is missing, unexpected or mis-shaped; all of them are listed.
    """
    return dict(iter_to_hf(params, config))


def iter_to_hf(params: Mapping[str, Any], config: Idefics2Config) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, contiguous array) of `to_hf` one tensor at a time."""
    flat, wanted = flatten(params), leaves(config)
    _check_same({leaf.rule.ours for leaf in wanted}, set(flat), "parameters")
    _check_shapes([(leaf.rule.ours, tuple(flat[leaf.rule.ours].shape), leaf.shape) for leaf in wanted])
    for leaf in wanted:
        array = np.asarray(flat[leaf.rule.ours])
        for i, name in enumerate(leaf.names):
            yield name, np.ascontiguousarray(leaf.rule.op.to_hf(array[i] if leaf.rule.stacked else array))


def check_names(tensors: Mapping[str, Any], wanted: list[Leaf], *, tied: bool) -> None:
    """Raises ConversionError unless `tensors` holds every tensor of `wanted`, of its shape, and no other.

    A tied model's file may hold the head a second time.
    """
    shapes = {name: leaf.hf_shape for leaf in wanted for name in leaf.names}
    found = set(tensors) - ({HEAD} if tied else set())
    _check_same(set(shapes), found, "tensors")
    _check_shapes([(name, tuple(tensors[name].shape), shape) for name, shape in shapes.items()])


def _check_same(wanted: set[str], found: set[str], noun: str) -> None:
    missing, unexpected = sorted(wanted - found), sorted(found - wanted)
    if missing or unexpected:
        raise ConversionError(
            f"the {noun} are not those that config.json describes; correct the config or the file\n"
            f"  missing ({len(missing)}): {', '.join(missing) or 'none'}\n"
            f"  unexpected ({len(unexpected)}): {', '.join(unexpected) or 'none'}"
        )


def _check_shapes(triples: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
    wrong = [
        f"{name} is {list(found)}, config.json asks for {list(wanted)}"
        for name, found, wanted in triples
        if found != wanted
    ]
    if wrong:
        raise ConversionError(f"mis-shaped ({len(wrong)}), correct the config or the file: {'; '.join(sorted(wrong))}")


def _check_tied(tensors: Mapping[str, Any]) -> None:
    head, embedding = np.asarray(tensors[HEAD]), np.asarray(tensors[EMBEDDING])
    if head.dtype != embedding.dtype or head.tobytes() != embedding.tobytes():
        raise ConversionError(
            f"{HEAD} differs from {EMBEDDING} although config.json ties them; set tie_word_embeddings to false"
        )


def _read(tensors: Mapping[str, Any], leaf: Leaf) -> np.ndarray:
    """Reads the tensors of one leaf; a stack is filled layer by layer."""
    to_ours = leaf.rule.op.to_ours
    if not leaf.rule.stacked:
        return np.ascontiguousarray(to_ours(np.asarray(tensors[leaf.names[0]])))
    stack = None
    for i, name in enumerate(leaf.names):
        layer = to_ours(np.asarray(tensors[name]))
        if stack is None:
            stack = np.empty(leaf.shape, layer.dtype)
        if layer.dtype != stack.dtype:
            raise ConversionError(
                f"{name} is {layer.dtype} but {leaf.names[0]} is {stack.dtype}; save all layers in one dtype"
            )
        stack[i] = layer
    return stack
