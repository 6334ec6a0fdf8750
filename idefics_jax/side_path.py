"""What adapters add to a product `y = x @ W` whose kernel W is frozen, without forming anything of W's shape.

LoRA (Hu et al. 2021):   y + (x @ A) @ B
DoRA (Liu et al. 2024):  (y + (x @ A) @ B) * m / n,   n = the column norms of W + A @ B

B comes scaled by alpha / rank (param_transforms.lora.scale). The reference is PEFT, but for two things about dropout.
Its DoRA also drops out of the input of the frozen product and so computes that product twice; here only the side path's
input is dropped. And it draws a mask for each Linear; here those that read the same input from one product share one
(layers.shared_lora_a). Each of them sees the distribution that PEFT's does; they are no longer independent.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from idefics_jax.dropout import dropped


def adapted(
    x: jax.Array,
    y: jax.Array,
    kernel: jax.Array,
    kernel_scale: jax.Array | None,
    adapter: Mapping[str, jax.Array],
    rng: jax.Array | None,
    x_a: jax.Array | None,
) -> jax.Array:
    """Adds an adapter to a product.

    Args:
      x: [.., in].
      y: x @ W, [.., out].
      kernel: [in, out], int8 if there is a `kernel_scale`.
      kernel_scale: [out], W = kernel * kernel_scale, or None.
      adapter: `lora_A` [in, R], `lora_B` [R, out]; for DoRA `lora_magnitude` [out]; for training with dropout
        `lora_dropout` [], its rate.
      rng: key for the dropout; without one nothing is dropped.
      x_a: x @ lora_A, dropout included, where it is known already, or None.

    Returns:
      [.., out] in y's dtype.
    """
    lora_a, lora_b = adapter["lora_A"].astype(y.dtype), adapter["lora_B"].astype(y.dtype)
    if x_a is None:
        if rng is not None and "lora_dropout" in adapter:
            x = dropped(x, adapter["lora_dropout"], rng)
        x_a = checkpoint_name(x @ lora_a, "lora")
    # What the remat policy "linear" keeps: the sum, of which DoRA's scaling is cheap to repeat and has its gradient.
    y = checkpoint_name(_one_gradient(y + x_a @ lora_b), "linear")
    if "lora_magnitude" in adapter:
        # A constant of the backward pass (DoRA, section 4.3): its gradient costs memory and changes little.
        norms = jax.lax.stop_gradient(column_norms(kernel, kernel_scale, lora_a, lora_b))
        y = y * (adapter["lora_magnitude"].astype(jnp.float32) / norms).astype(y.dtype)
    return y


@jax.custom_vjp
def _one_gradient(y: jax.Array) -> jax.Array:
    """Returns y, whose gradient is written to memory once.

    Three products read it, where full training has two. A TPU's compiler would compute the activation's share of it
    anew inside each of them, which makes a 7B step 4 per cent longer by its own estimate.
    """
    return y


_one_gradient.defvjp(lambda y: (y, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


def column_norms(kernel: jax.Array, kernel_scale: jax.Array | None, lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
    """Returns the norm of each column of W + A @ B: float32 [out].

    |W + AB|² = |W|² + 2 (WᵀA)·B + B·(AᵀA)B, column by column: the largest array made is [out, R].
    """
    squares = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=0)
    kernel = kernel.astype(lora_a.dtype)
    into = jnp.einsum("io,ir->ro", kernel, lora_a, preferred_element_type=jnp.float32)
    if kernel_scale is not None:
        scale = kernel_scale.astype(jnp.float32)
        squares, into = squares * jnp.square(scale), into * scale
    lora_b = lora_b.astype(jnp.float32)
    gram = jnp.einsum("ir,is->rs", lora_a, lora_a, preferred_element_type=jnp.float32)
    squares = squares + jnp.sum((2 * into + gram @ lora_b) * lora_b, axis=0)
    return jnp.sqrt(jnp.maximum(squares, 0.0))  # rounding may leave a column of zeros just below zero


def neftune(x: jax.Array, segment_ids: jax.Array, alpha: float, rng: jax.Array) -> jax.Array:
    """Adds uniform noise of ±alpha / sqrt(length · D) to each document's embeddings (NEFTune, Jain et al. 2023).

    The authors' code noises the merged embeddings, images' too, and takes the padded length of the batch; here it is
    the document's own, so that the noise does not depend on what shares its row.

    Args:
      x: [B, T, D] embeddings.
      segment_ids: int32 [B, T], 0 = padding.
      alpha: strength; 5 to 15 in the NEFTune paper.
      rng: key.
    """

    def of_row(ids: jax.Array) -> jax.Array:  # alone, or the devices would add up what each knows of all rows
        return jnp.bincount(ids, length=ids.size + 1)[ids]

    lengths = jax.vmap(of_row)(segment_ids).astype(jnp.float32)
    noise = jax.random.uniform(rng, x.shape, x.dtype, -1.0, 1.0)
    return x + noise * (alpha * jax.lax.rsqrt(lengths * x.shape[-1]))[..., None].astype(x.dtype)
