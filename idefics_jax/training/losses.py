"""Next-token cross-entropy that never holds the logits of a whole batch.

Float32 logits [B, T, V] of one 7B batch are gigabytes. Here a chunk of T at a time is turned into logits, reduced to
its loss, and recomputed in the backward pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def next_token_loss(
    hidden: jax.Array,
    tokens: jax.Array,
    loss_weights: jax.Array,
    logits: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    chunk: int,
) -> dict[str, jax.Array]:
    """Sums the weighted cross-entropy of each token given those before it.

    Args:
      hidden: [B, T, D] final hidden states.
      tokens: int32 [B, T]; position t is scored on tokens[t + 1].
      loss_weights: float32 [B, T], weight of that score (batch.py).
      logits: [B, chunk, D] and the chunk's number, int32 [] -> float32 [B, chunk, V].
      chunk: positions scored at once; T is padded up to a multiple. From T on, all logits exist at once.

    Returns:
      Float32 sums over the batch: "loss" (nats, weighted), "correct" (weighted top-1 hits), "weight".
    """
    targets = jnp.roll(tokens, -1, axis=1)
    length = tokens.shape[1]
    chunk = min(chunk, length)
    chunks = -(-length // chunk)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    def score(index, x, target, weight):
        scores = logits(x, index)
        picked = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(scores, axis=-1) - picked
        correct = jnp.argmax(scores, axis=-1) == target
        return jnp.sum(loss * weight), jnp.sum(correct * weight)

    def add(sums, inputs):
        return jax.tree.map(jnp.add, sums, score(*inputs)), None

    # A single chunk holds all logits at once in either pass: nothing is saved by computing them twice.
    score = score if chunks == 1 else jax.checkpoint(score)
    start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    inputs = (jnp.arange(chunks), split(hidden), split(targets), split(loss_weights))
    (loss, correct), _ = jax.lax.scan(add, start, inputs)
    return {"loss": loss, "correct": correct, "weight": jnp.sum(loss_weights)}
