"""Idefics2 in JAX: `load` a model, `Processor.load` its processor, `interop` with Hugging Face's inputs.

Names are imported when they are first used, so that importing the package costs nothing.
"""

import importlib
from typing import Any

__all__ = ["Model", "Processor", "interop", "load"]

_HOMES = {"Model": "idefics_jax.model", "Processor": "idefics_jax.processor", "load": "idefics_jax.model"}


def __getattr__(name: str) -> Any:
    if name == "interop":
        return importlib.import_module("idefics_jax.interop")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'idefics_jax' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
