"""The layers every part is built from, each parameter with its logical axis names.

Dim letters, here and in every einsum of the package:

    B batch            T text or query length   S key or patch length   N query heads     K key/value heads
    G = N / K          H head dim               D width                 F mlp width       V vocabulary
    L layers           R LoRA rank              I images a row          P patches         Q latents
    E vision width     C numbers in a patch

(`V` is also the number of vision rows of a batch.) Parameters keep the dtype they are given; the arithmetic of a
product runs in the module's `dtype`, norms run in float32.

What adapts a layer lies in the `adapters` collection under the layer's path (param_transforms): LoRA and DoRA on a
side path (side_path.py), so that the frozen kernel's gradient is never formed and bf16 does not swallow the adapter,
as it does when it is merged into the kernel first; and `new_rows`, which stand for the last rows of a vocabulary.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from idefics_jax.dropout import dropped
from idefics_jax.sharding import constrain
from idefics_jax.side_path import adapted

Dtype = jnp.dtype
Initializer = Callable[..., jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
}


class Linear(nn.Module):
    """`x @ kernel (+ bias)`; kernel is [in, out] with the logical names `axes`.

    A frozen kernel may be int8 with a `kernel_scale` [out] beside it (param_transforms.quantize).

    Attributes:
      features: size of the output.
      axes: logical names of the kernel's two dims.
      std: standard deviation of the kernel's normal initialisation.
      dtype: dtype of the product.
      use_bias: whether a bias is added.
    """

    features: int
    axes: tuple[str, str]
    std: float
    dtype: Dtype
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, x_a: jax.Array | None = None) -> jax.Array:
        """Returns [.., out]; `x_a` is x @ lora_A where the caller has it already (shared_lora_a)."""
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        scale = self.get_variable("params", "kernel_scale")
        adapter = self.variables.get("adapters", {})
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if scale is not None:
            y = y * scale.astype(self.dtype)
        if "lora_A" in adapter:
            rng = self.make_rng("dropout") if self.has_rng("dropout") else None
            y = adapted(x, y, kernel, scale, adapter, rng, x_a)
        else:
            y = checkpoint_name(y, "linear")
        if "new_rows" in adapter:
            new = x @ adapter["new_rows"].astype(self.dtype)
            y = jax.lax.dynamic_update_slice_in_dim(y, new, self.features - new.shape[-1], axis=-1)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y = y + self.param("bias", init, (self.features,)).astype(self.dtype)
        return y


def shared_lora_a(module: nn.Module, x: jax.Array, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """Returns {name: x @ lora_A} of Linears below `module` that read the same input, from one product.

    A product with rank 64 is bound by reading x: on a v5p one product for q, k and v and one for gate and up take 2 per
    cent off a 7B LoRA step, by its compiler's estimate (README). They drop out of it together, by one mask. Empty where
    one of them has no adapter, or where `module` has no `lora_dropout` that all of them share (lora.with_dropout).
    """
    adapters = module.variables.get("adapters", {})
    chosen = [adapters.get(name, {}) for name in names]
    if not all("lora_A" in adapter for adapter in chosen):
        return {}
    if module.has_rng("dropout") and any("lora_dropout" in adapter for adapter in chosen):
        if "lora_dropout" not in adapters:
            return {}
        x = dropped(x, adapters["lora_dropout"], module.make_rng("dropout"))
    joined = jnp.concatenate([adapter["lora_A"].astype(x.dtype) for adapter in chosen], axis=-1)
    ends = np.cumsum([adapter["lora_A"].shape[-1] for adapter in chosen])[:-1]
    return dict(zip(names, jnp.split(checkpoint_name(x @ joined, "lora"), ends, axis=-1), strict=True))


class Embedding(nn.Module):
    """A table [size, features] looked up by integer ids.

    Attributes:
      axes: the table's logical names.
      untrained: an id whose looked-up row gets no gradient (torch's padding_idx), or None.
    """

    size: int
    features: int
    axes: tuple[str, str]
    std: float
    dtype: Dtype
    untrained: int | None = None

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.axes)
        self.embedding = self.param("embedding", init, (self.size, self.features))

    def __call__(self, ids: jax.Array) -> jax.Array:
        # Rows are whole wherever they are looked up: a lookup in a table cut along its features makes XLA copy the
        # result to every device. In float32, so that the gradients of a frequent id are summed in it.
        table = constrain(self.embedding, (self.axes[0], None))
        x = jnp.take(table, ids, axis=0, mode="clip")
        new = self.get_variable("adapters", "new_rows")
        if new is not None:
            first = self.size - new.shape[0]
            # The rows below are looked up apart, so that no gradient of the table's own size is made for them.
            x = jnp.where((ids >= first)[..., None], jnp.take(new, ids - first, axis=0, mode="clip"), x)
        if self.untrained is not None:
            x = jnp.where((ids == self.untrained)[..., None], jax.lax.stop_gradient(x), x)
        return x.astype(self.dtype)

    def table(self) -> jax.Array:
        """Returns the rows in use, new ones included: [size, features]."""
        new = self.get_variable("adapters", "new_rows")
        return self.embedding if new is None else self.embedding.at[self.size - new.shape[0] :].set(new)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, in float32; returns `x.dtype` (reference: MistralRMSNorm)."""

    eps: float
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last dim with scale and bias, in float32; returns `x.dtype`."""

    eps: float
    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), (x.shape[-1],))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,)), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` without biases (reference: MistralMLP, Idefics2MLP).

    Attributes:
      intermediate: F, width between the products.
      features: size of the output.
      act: name in ACTIVATIONS.
      axes: logical names of the input and of the output width.
      std: (gate and up, down) initialisation.
    """

    intermediate: int
    features: int
    act: str
    axes: tuple[str, str]
    std: tuple[float, float]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width_in, width_out = self.axes
        x = x.astype(self.dtype)
        x_a = shared_lora_a(self, x, ("gate_proj", "up_proj"))

        def widened(name):
            linear = Linear(self.intermediate, (width_in, "mlp"), self.std[0], self.dtype, name=name)
            return linear(x, x_a.get(name))

        gate, up = widened("gate_proj"), widened("up_proj")
        y = ACTIVATIONS[self.act](gate) * up
        return Linear(self.features, ("mlp", width_out), self.std[1], self.dtype, name="down_proj")(y)
