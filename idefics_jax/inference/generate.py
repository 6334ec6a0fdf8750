"""Autoregressive generation: one prefill, then a token a row a step from the key/value cache, all in one program.

Prompts are left-padded to a common length (Processor does so), so every row writes the same cache slot at each step.
The program depends on the shapes alone: one compilation serves every prompt up to the bucket it is padded to.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from idefics_jax.batch import Batch
from idefics_jax.cache import Cache, empty_cache
from idefics_jax.errors import UserError
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.stack import unrolled_params, unstack


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and when a row ends.

    Attributes:
      max_new_tokens: most tokens a row.
      stop_ids: a row ends with the first of these; it is part of the result.
      banned_ids: never chosen. The image tokens belong here: the model has no image to put in their place.
      temperature: 0 for greedy, else the logits are divided by it and sampled from.
      top_p: sample only among the likeliest tokens that together hold this probability.
      unroll: whether to cut the decoder's layers apart before the token loop: no weight and no cache is copied in it,
        but the decoder's weights are held twice meanwhile, and compile time grows with depth.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]
    temperature: float
    top_p: float
    unroll: bool = False

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        # Logits divided by less are beyond float32.
        if self.temperature and not 1e-6 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a number of at least 1e-6")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1]")


def choose(logits: jax.Array, decoding: Decoding, rng: jax.Array) -> jax.Array:
    """Picks a token for each row: float32 [B, V] -> int32 [B]."""
    if decoding.banned_ids:
        logits = logits.at[:, jnp.asarray(decoding.banned_ids)].set(-jnp.inf)
    if decoding.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / decoding.temperature
    if decoding.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        share = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        # The first token that reaches the share still belongs to it.
        last = jnp.sum(share < decoding.top_p, axis=-1, keepdims=True)
        logits = jnp.where(logits < jnp.take_along_axis(ordered, last, axis=-1), -jnp.inf, logits)
    return jax.random.categorical(rng, logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def generate(
    model: Idefics2, variables: dict[str, Any], batch: Batch, decoding: Decoding, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Continues every row of a batch.

    Args:
      model: the module.
      variables: {"params": ...}, with {"adapters": scaled adapters} if there are any.
      batch: prompts, left-padded; a row that is all padding stays empty.
      decoding: how to choose, when to end.
      rng: key; greedy decoding does not use it.

    Returns:
      int32 [B, max_new_tokens] new tokens, 0 after a row's end, and int32 [B] how many of them are a row's own.
    """
    state = begin(model, variables, batch, decoding, rng)
    if decoding.unroll:
        model, variables, state["cache"] = _unrolled(model, variables, state["cache"])

    def going(state):
        return jnp.any(state["alive"]) & (state["step"] < decoding.max_new_tokens - 1)

    end = jax.lax.while_loop(going, lambda state: advance(model, variables, state, decoding, rng), state)
    return end["tokens"], end["lengths"]


def begin(
    model: Idefics2, variables: dict[str, Any], batch: Batch, decoding: Decoding, rng: jax.Array
) -> dict[str, Any]:
    """Reads the prompts and chooses the first token of each row; arguments as `generate`'s.

    Returns:
      What `advance` takes: the cache, the tokens so far, and which rows have not ended.
    """
    rows, length = batch["tokens"].shape
    cache = empty_cache(
        model.config.text_config, batch=rows, length=length + decoding.max_new_tokens - 1, dtype=model.dtype
    )
    hidden, cache = model.apply(variables, batch, cache)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "token": _next_token(model, variables, hidden, decoding, rng, 0),
        "position": batch["positions"][:, -1],
        "alive": jnp.any(batch["segment_ids"] > 0, axis=1),
        "lengths": jnp.zeros((rows,), jnp.int32),
        "tokens": jnp.zeros((rows, decoding.max_new_tokens), jnp.int32),
        "cache": cache,
    }
    return _keep(state, decoding)


def advance(
    model: Idefics2, variables: dict[str, Any], state: dict[str, Any], decoding: Decoding, rng: jax.Array
) -> dict[str, Any]:
    """Chooses one more token of each row; `state` is of `begin` or of this."""
    position, count = state["position"] + 1, state["step"] + 1
    one = {
        "tokens": state["token"][:, None],
        "positions": position[:, None],
        "segment_ids": jnp.ones((len(position), 1), jnp.int32),
    }
    hidden, cache = model.apply(variables, one, state["cache"])
    token = _next_token(model, variables, hidden, decoding, rng, count)
    return _keep({**state, "step": count, "token": token, "position": position, "cache": cache}, decoding)


def _next_token(model, variables, hidden, decoding, rng, count):
    """Chooses after the last position of each row: [B, T, D] -> int32 [B]."""
    logits = model.apply(variables, hidden[:, -1], method=Idefics2.logits)
    return choose(logits, decoding, jax.random.fold_in(rng, count))


def _keep(state: dict[str, Any], decoding: Decoding) -> dict[str, Any]:
    """Writes the chosen token of every living row; a stop token is the last one kept."""
    token = jnp.where(state["alive"], state["token"], 0)
    tokens = jax.lax.dynamic_update_slice_in_dim(state["tokens"], token[:, None], state["step"], axis=1)
    stopped = jnp.isin(token, jnp.asarray(decoding.stop_ids, jnp.int32))
    lengths = state["lengths"] + state["alive"]
    return {**state, "tokens": tokens, "lengths": lengths, "alive": state["alive"] & ~stopped, "token": token}


def _unrolled(model: Idefics2, variables: dict[str, Any], cache: Cache) -> tuple[Idefics2, dict[str, Any], Cache]:
    """Cuts the decoder's layers, their adapters and their caches apart."""

    def cut(tree: dict[str, Any]) -> dict[str, Any]:
        text = tree.get("text_model", {})
        if "layers" not in text:  # no adapters there
            return tree
        return {**tree, "text_model": {**text, "layers": unrolled_params(text["layers"])}}

    variables = {name: cut(collection) for name, collection in variables.items()}
    return model.clone(unroll=True), variables, {**cache, "layers": unstack(cache["layers"])}
