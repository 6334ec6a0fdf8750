"""Operations that a training step needs by its algorithm, whatever the program does.

Counted are the products of the forward pass, their gradients to the input where something that trains lies below, and
to the weights that train; of attention the pairs that see each other. Not counted: padding, what is recomputed, what
is masked, norms, activations and the optimizer, which are a few operations a number. A multiply-add is two operations.
Every real token passes the head, as in published figures.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from idefics_jax.config import Idefics2Config
from idefics_jax.param_transforms import paths


@dataclasses.dataclass(frozen=True)
class Work:
    """What a batch holds, summed over its rows.

    Attributes:
      tokens, patches, images: real ones.
      text_pairs: pairs of a token and one that it sees: of its own document, at or before it, within the window.
      vision_pairs: pairs of patches of the same image.
    """

    tokens: float
    patches: float
    images: float
    text_pairs: float
    vision_pairs: float


@dataclasses.dataclass(frozen=True)
class Product:
    """A Linear: `rows` inputs of `width` to `features`."""

    path: str
    rows: float
    width: int
    features: int


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Attention: `count` pairs by as many heads' widths as `width` together."""

    count: float
    width: int


@dataclasses.dataclass(frozen=True)
class Trained:
    """What trains: {path: shape}, without the axis of the layers.

    Attributes:
      params: parameters that train in full.
      adapters: adapters.
    """

    params: Mapping[str, tuple[int, ...]]
    adapters: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, trainable: Mapping[str, Any]) -> "Trained":
        """Reads it off the `trainable` of a training state (training/step.py), as arrays or shapes."""
        return cls(*(_shapes(trainable.get(part, {})) for part in ("params", "adapters")))

    def below(self, prefix: str) -> bool:
        """Whether anything trains under a path."""
        return any(path.startswith(prefix) for group in (self.params, self.adapters) for path in group)


def step_flops(config: Idefics2Config, work: Work, trained: Trained) -> dict[str, float]:
    """Returns the operations of one step by part of the model.

    Args:
      config: sizes.
      work: what the batch holds.
      trained: what trains. Parts that run before the first of it have no backward pass.
    """
    found: dict[str, float] = {}
    below = False
    for part, layers, groups in _parts(config, work):
        total = 0.0
        for layer in range(layers):
            below = below or (layer > 0 and trained.below(part))
            for group in groups:
                total += sum(_cost(one, trained, below) for one in group)
                below = below or any(isinstance(one, Product) and trained.below(f"{one.path}/") for one in group)
        below = below or trained.below(part)
        found[part] = total
        if part == "connector/perceiver_resampler":  # where the words come in
            below = below or trained.below("text_model/embed_tokens")
    return found


def _cost(one: Product | Pairs, trained: Trained, below: bool) -> float:
    if isinstance(one, Pairs):
        # Scores and their sum over the values; in the backward pass both of each one's inputs.
        return one.count * one.width * (4 + (8 if below else 0))
    once = 2 * one.rows * one.width * one.features
    total = once * (1 + below + (f"{one.path}/kernel" in trained.params))
    if (shape := trained.adapters.get(f"{one.path}/lora_A")) is not None:
        rank = shape[-1]
        into, out = 2 * one.rows * one.width * rank, 2 * one.rows * rank * one.features
        # Forward, both weights' gradients, that to the inner input always, to the outer one where it is wanted.
        total += into * (2 + below) + out * 3
    if f"{one.path}/lora_magnitude" in trained.adapters:
        total += 2 * one.width * one.features * rank  # the columns' norms, once a step
    if (shape := trained.adapters.get(f"{one.path}/new_rows")) is not None:
        total += 2 * one.rows * one.width * shape[-1] * (2 + below)
    return total


def _parts(config: Idefics2Config, work: Work) -> Iterable[tuple[str, int, list[list[Product | Pairs]]]]:
    """Yields (path, layers, products of a layer in the order they run, those of one input together)."""
    vision, text, resampler = config.vision_config, config.text_config, config.perceiver_config
    width, mlp = vision.hidden_size, vision.intermediate_size
    at = "vision_model/embeddings"
    yield at, 1, [[Product(f"{at}/patch_embedding", work.patches, vision.patch_dim, width)]]
    at = "vision_model/encoder"
    inner = f"{at}/layers"
    yield (
        at,
        vision.num_hidden_layers,
        [
            [Product(f"{inner}/self_attn/{name}_proj", work.patches, width, width) for name in "qkv"],
            [Pairs(work.vision_pairs, width)],
            [Product(f"{inner}/self_attn/out_proj", work.patches, width, width)],
            [Product(f"{inner}/mlp/fc1", work.patches, width, mlp)],
            [Product(f"{inner}/mlp/fc2", work.patches, mlp, width)],
        ],
    )
    at = "connector/modality_projection"
    yield at, 1, _gated(at, work.patches, width, text.intermediate_size, text.hidden_size)
    yield _resampler(resampler, work)
    heads, kv_heads = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    at = "text_model/layers"
    yield (
        at,
        text.num_hidden_layers,
        [
            [
                Product(f"{at}/self_attn/{name}_proj", work.tokens, text.hidden_size, features)
                for name, features in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            ],
            [Pairs(work.text_pairs, heads)],
            [Product(f"{at}/self_attn/o_proj", work.tokens, heads, text.hidden_size)],
            *_gated(f"{at}/mlp", work.tokens, text.hidden_size, text.intermediate_size, text.hidden_size),
        ],
    )
    at = "text_model/lm_head"
    yield at, 1, [[Product(at, work.tokens, text.hidden_size, text.vocab_size)]]


def _resampler(config: Any, work: Work) -> tuple[str, int, list[list[Product | Pairs]]]:
    """Each image's latents read its patches and themselves."""
    width, at = config.hidden_size, "connector/perceiver_resampler"
    latents = work.images * config.resampler_n_latents
    heads, kv_heads = (
        count * config.resampler_head_dim for count in (config.resampler_n_heads, config.num_key_value_heads)
    )
    inner = f"{at}/layers"
    groups: list[list[Product | Pairs]] = [
        [
            Product(f"{inner}/self_attn/q_proj", latents, width, heads),
            Product(f"{inner}/self_attn/k_proj", work.patches + latents, width, kv_heads),
            Product(f"{inner}/self_attn/v_proj", work.patches + latents, width, kv_heads),
        ],
        [Pairs(config.resampler_n_latents * (work.patches + latents), heads)],
        [Product(f"{inner}/self_attn/o_proj", latents, heads, width)],
        *_gated(f"{inner}/mlp", latents, width, 4 * width, width),
    ]
    return at, config.resampler_depth, groups


def _gated(at: str, rows: float, width: int, mlp: int, features: int) -> list[list[Product | Pairs]]:
    return [
        [Product(f"{at}/{name}_proj", rows, width, mlp) for name in ("gate", "up")],
        [Product(f"{at}/down_proj", rows, mlp, features)],
    ]


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in paths.flatten(tree).items()}
