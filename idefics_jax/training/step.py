"""The training step: one jitted function from state and batch to the next state.

    state = {"trainable": {"params": ..., "adapters": ...}, "opt_state": ...,
             "step": int32 [], "skipped": int32 [], "halted_at": int32 []}

(`trainable` holds only those of its two trees that have a leaf.) Trainable leaves are float32 masters; frozen
parameters are an argument of their own and are never donated, copied or given optimizer state.

A step whose loss or gradient is not finite changes neither parameters nor moments. It is skipped (it counts as a step,
so data and schedule move on) until `max_skipped` have been; the next one sets `halted_at`, and from then on every step
is a no-op, so the host may look at the numbers late, without a sync in each step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from idefics_jax.batch import Batch
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.param_transforms import lora
from idefics_jax.param_transforms.partition import combine
from idefics_jax.training.losses import next_token_loss

State = dict[str, Any]
RUNNING = -1


def variables(trainable: dict[str, Any], frozen: dict[str, Any], spec: lora.LoraSpec) -> dict[str, Any]:
    """Returns the model's variables: parameters joined from both parts, and scaled adapters if there are any."""
    joined = {"params": combine(trainable.get("params", {}), frozen)}
    if "adapters" in trainable:
        joined["adapters"] = lora.scale(trainable["adapters"], spec)
    return joined


def batch_sums(
    model: Idefics2,
    model_variables: dict[str, Any],
    batch: Batch,
    *,
    chunk: int,
    rngs: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """Returns the float32 sums of losses.next_token_loss over a batch; `rngs` are the keys of training's noise."""
    hidden, _ = model.apply(model_variables, batch, rngs=rngs)
    head = {
        collection: {"text_model": {model.head: tree["text_model"][model.head]}}
        for collection, tree in model_variables.items()
        if model.head in tree.get("text_model", {})
    }

    def logits(head, x, index, row):
        # Each chunk drops out of the head's input anew, each row by itself, whatever device it lies on.
        keys = {name: jax.random.fold_in(jax.random.fold_in(key, index), row) for name, key in rngs.items()}
        return model.apply(head, x, rngs=keys, method=Idefics2.logits)

    return next_token_loss(hidden, batch["tokens"], batch["loss_weights"], head, logits, chunk=chunk)


def make_train_step(
    model: Idefics2,
    optimizer: optax.GradientTransformation,
    spec: lora.LoraSpec,
    *,
    accumulation: int,
    chunk: int,
    seed: int,
    max_skipped: int,
) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
    """Builds `step(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    Args:
      model: the module.
      optimizer: from training.optimizer.
      spec: LoRA targets of the adapters in the state.
      accumulation: micro-batches a step; rows of the batch are dealt out to them. The loss is divided by the weight
        of the whole batch, so the result does not depend on this number beyond rounding.
      chunk: positions whose logits exist at once.
      seed: of dropout and of the noise on embeddings; they depend on it and on the number of the step alone, so that a
        resumed run repeats them.
      max_skipped: steps of a run that may be skipped as not finite before it halts.

    Returns:
      The step. Metrics are scalars: step, loss, accuracy, skipped (whether this step was), halted_at, grad_norm and
      update_norm, both also by part of the model, and those of batch_counts.
    """

    def loss_fn(trainable, frozen, batch, total, rng):
        model_variables = variables(trainable, frozen, spec)
        if "adapters" in trainable:
            model_variables["adapters"] = lora.with_dropout(model_variables["adapters"], spec)
        dropout, neftune = jax.random.split(rng)
        sums = batch_sums(model, model_variables, batch, chunk=chunk, rngs={"dropout": dropout, "neftune": neftune})
        return sums["loss"] / total, sums["correct"] / total

    def gradients(trainable, frozen, batch, rng):
        total = jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)
        grad = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulation == 1:
            return grad(trainable, frozen, batch, total, rng)

        def add(carry, inputs):
            micro, micro_rng = inputs
            return jax.tree.map(jnp.add, carry, grad(trainable, frozen, micro, total, micro_rng)), None

        # Row r goes to micro-batch r % accumulation: each keeps every device busy.
        micros = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
        zeros = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, trainable))
        return jax.lax.scan(add, zeros, (micros, jax.random.split(rng, accumulation)))[0]

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state["step"])
        (loss, accuracy), grads = gradients(state["trainable"], frozen, batch, rng)
        new, metrics = advance(state, loss, grads, optimizer, max_skipped=max_skipped)
        return new, {"accuracy": accuracy, **metrics, **batch_counts(batch)}

    return step


def advance(
    state: State, loss: jax.Array, grads: dict[str, Any], optimizer: optax.GradientTransformation, *, max_skipped: int
) -> tuple[State, dict[str, jax.Array]]:
    """Returns the state after a step with a loss and its gradients, if they are finite, and the step's own metrics."""
    grad_norms = norms(grads, "grad_norm")
    running = state["halted_at"] == RUNNING
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norms["grad_norm"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["trainable"])
    new = {"trainable": optax.apply_updates(state["trainable"], updates), "opt_state": opt_state}
    # Decided before the update is known, so that one pass over the state makes and keeps it.
    new = jax.tree.map(lambda a, b: jnp.where(running & finite, a, b), new, {name: state[name] for name in new})
    skipped = state["skipped"] + (running & ~finite)
    update_norms = norms(updates, "update_norm")
    # A finite gradient that gives an update which is not leaves nothing to go on from.
    broken = finite & ~jnp.isfinite(update_norms["update_norm"])
    halts = running & ((skipped > max_skipped) | broken)
    new["step"] = state["step"] + (running & ~halts)
    new["skipped"] = skipped
    new["halted_at"] = jnp.where(halts, state["step"], state["halted_at"])
    metrics = {"step": state["step"], "loss": loss, "skipped": running & ~finite & ~halts}
    return new, {**metrics, "halted_at": new["halted_at"], **grad_norms, **update_norms}


def norms(trainable: dict[str, Any], name: str) -> dict[str, jax.Array]:
    """Returns the norm of a tree like `trainable`, and as `name/part` that of each part of the model."""
    parts = sorted({part for tree in trainable.values() for part in tree})
    squares = {
        part: sum(jnp.square(optax.tree.norm(tree[part])) for tree in trainable.values() if part in tree)
        for part in parts
    }
    by_part = {f"{name}/{part}": jnp.sqrt(square) for part, square in squares.items()}
    return {name: jnp.sqrt(sum(squares.values())), **by_part}


def batch_counts(batch: Batch) -> dict[str, jax.Array]:
    """Counts what a batch holds: real tokens, and of a batch with images how many, and the useful shares.

    `attention_share` is that of the pairs of patches in a vision row which lie within one image: what attention without
    block skipping computes for use.
    """
    tokens = batch["segment_ids"] > 0
    counts = {"tokens": jnp.sum(tokens, dtype=jnp.float32), "token_fill": jnp.mean(tokens, dtype=jnp.float32)}
    if "patches" in batch:
        counts["images"] = jnp.sum(batch["image_mask"], dtype=jnp.float32)
        counts["patch_fill"] = jnp.mean(batch["patch_image_ids"] > 0, dtype=jnp.float32)
        rows, _, length = batch["patch_image_ids"].shape
        ids = batch["patch_image_ids"].reshape(rows, -1)
        # Row by row, or the devices would add up what each knows of all rows.
        of_row = functools.partial(jnp.bincount, length=batch["image_mask"].shape[1] + 1)
        sizes = jax.vmap(of_row)(ids)[:, 1:].astype(jnp.float32)
        counts["attention_share"] = jnp.sum(sizes**2) / float(ids.size * length)  # beyond int32 at 2,048 rows
    return counts


def init_state(trainable: dict[str, Any], optimizer: optax.GradientTransformation) -> State:
    """Returns the state before the first step; its leaves are float32 copies of `trainable`."""
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    return {
        "trainable": trainable,
        "opt_state": optimizer.init(trainable),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        "halted_at": jnp.full((), RUNNING, jnp.int32),
    }


def state_axes(state_shapes: State, trainable_axes: dict[str, Any]) -> State:
    """Returns the logical axes of a state: an optimizer leaf shaped like a parameter at its path lies as that does."""
    by_path = {
        tuple(key.key for key in path): names
        for path, names in jax.tree_util.tree_flatten_with_path(trainable_axes, is_leaf=lambda x: isinstance(x, tuple))[
            0
        ]
    }

    def of_leaf(path: Sequence[Any], leaf: Any) -> tuple[str | None, ...]:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for start in range(len(names)):
            if names[start:] in by_path and len(by_path[names[start:]]) == leaf.ndim:
                return by_path[names[start:]]
        return (None,) * leaf.ndim

    return jax.tree_util.tree_map_with_path(of_leaf, state_shapes)
