"""Nested dicts as flat dicts keyed by path, the form in which patterns pick parameters."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"a/b/c": leaf}; anything that is not a dict is a leaf."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}/"))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`; empty dicts are lost."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def parent(path: str) -> str:
    """Returns the path of the module a leaf belongs to."""
    return path.rpartition("/")[0]


def name(path: str) -> str:
    """Returns a leaf's own name."""
    return path.rpartition("/")[2]


def map_paths(fn: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree with every leaf replaced by `fn(path, leaf)`."""
    return unflatten({path: fn(path, leaf) for path, leaf in flatten(tree).items()})


def select(patterns: Iterable[str], paths: Iterable[str], *, field: str) -> dict[str, str]:
    """Returns {path: the first pattern that matches all of it}.

    Args:
      patterns: regular expressions, matched against the whole path.
      paths: the paths to choose from.
      field: the configuration field the patterns come from, for messages.

    Raises:
      ValueError: a pattern is malformed or is the first match of no path.
    """
    paths, chosen, idle = list(paths), {}, []
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{field}: {pattern!r} is not a regular expression ({error})") from error
        matched = [path for path in paths if path not in chosen and regex.fullmatch(path)]
        chosen.update(dict.fromkeys(matched, pattern))
        if not matched:
            idle.append(pattern)
    if idle:
        example = f"; a path looks like {paths[0]!r}" if paths else ""
        raise ValueError(f"{field}: {idle[0]!r} matches no parameter that an earlier pattern left{example}")
    return chosen
