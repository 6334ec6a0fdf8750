"""Next-token cross-entropy that never holds the logits of a whole batch.

Float32 logits [B, T, V] of one 7B batch are gigabytes. Here a chunk of T at a time is turned into logits, reduced to
its loss, and recomputed in the backward pass.

On a mesh each device scores its own rows under shard_map: the head is gathered once, not for every chunk, and its
gradient summed over the devices once. Where `act_vocab` is cut, so are the logits: a device multiplies by its columns
of the head alone and the parts of a softmax are summed. No logit is sent. A vocabulary that cannot be dealt out evenly
(the released one, 32,003, is prime) is filled up by the compiler within the program; parameters stay as they are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from idefics_jax.sharding import constrain, mesh_axes


def next_token_loss(
    hidden: jax.Array,
    tokens: jax.Array,
    loss_weights: jax.Array,
    head: Any,
    logits: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array],
    *,
    chunk: int,
) -> dict[str, jax.Array]:
    """Sums the weighted cross-entropy of each token given those before it.

    Args:
      hidden: [B, T, D] final hidden states.
      tokens: int32 [B, T]; position t is scored on tokens[t + 1].
      loss_weights: float32 [B, T], weight of that score (batch.py).
      head: the arrays that `logits` needs, any tree; floats among them that train are float32.
      logits: head, a chunk of a row [chunk, D], and the numbers of chunk and row, int32 [] -> float32 [chunk, V].
      chunk: positions of a row scored at once; T is padded up to a multiple. From T on, all logits exist at once.

    Returns:
      Float32 sums over the batch: "loss" (nats, weighted), "correct" (weighted top-1 hits), "weight".
    """
    rows = jnp.arange(hidden.shape[0], dtype=jnp.int32)
    arrays = rows, hidden, jnp.roll(tokens, -1, axis=1), loss_weights
    axes = mesh_axes("act_batch", hidden.shape[0])
    if not axes:
        return _sums(head, *arrays, logits=logits, chunk=chunk)

    def of_own_rows(head, *arrays):
        return jax.lax.psum(_sums(head, *arrays, logits=logits, chunk=chunk), axes)

    spread = PartitionSpec(axes)
    return jax.shard_map(
        of_own_rows,
        in_specs=(PartitionSpec(), *(spread for _ in arrays)),
        out_specs=PartitionSpec(),
        axis_names=set(axes),
        check_vma=False,
    )(head, *arrays)


def _sums(head, rows, hidden, targets, weights, *, logits, chunk) -> dict[str, jax.Array]:
    length = hidden.shape[1]
    chunk = min(chunk, length)
    chunks = -(-length // chunk)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    def score(index, x, target, weight):
        scores = jax.vmap(lambda row, own: logits(head, own, index, row))(rows, x)
        scores = constrain(scores, (None, None, "act_vocab"))
        # Sums and minima over the vocabulary, not look-ups: where it is cut, they take no more than a number a token.
        numbers = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        picked = jnp.sum(jnp.where(numbers == target[..., None], scores, 0.0), axis=-1)
        loss = jax.nn.logsumexp(scores, axis=-1) - picked
        best = scores == jnp.max(scores, axis=-1, keepdims=True)
        correct = jnp.min(jnp.where(best, numbers, scores.shape[-1]), axis=-1) == target
        return jnp.sum(loss * weight), jnp.sum(correct * weight)

    def add(sums, inputs):
        return jax.tree.map(jnp.add, sums, score(*inputs)), None

    # A single chunk holds all logits at once in either pass: nothing is saved by computing them twice.
    score = score if chunks == 1 else jax.checkpoint(score)
    start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    inputs = (jnp.arange(chunks), split(hidden), split(targets), split(weights))
    (loss, correct), _ = jax.lax.scan(add, start, inputs)
    return {"loss": loss, "correct": correct, "weight": jnp.sum(weights)}
