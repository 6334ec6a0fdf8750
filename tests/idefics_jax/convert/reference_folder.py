"""Folders saved by transformers, and what it says while it loads one."""

import contextlib
import logging
import warnings

import torch

from tests.idefics_jax import reference


def save(path, *, dtype: str, max_shard_size: str, tie: bool = False):
    """Saves a tiny random model with transformers and returns it."""
    model = reference.twin(tie_word_embeddings=tie).hf.to(getattr(torch, dtype))
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


@contextlib.contextmanager
def silence():
    """Yields a list that gathers every warning, of the warnings module and of the log of transformers."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    handler, log = Handler(logging.WARNING), logging.getLogger("transformers")
    log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said += [str(warning.message) for warning in caught]
    finally:
        log.removeHandler(handler)
