"""From prompts to answers: prompts of any length and number in, texts out, through one compiled program."""

from collections.abc import Iterator, Sequence

import jax

from idefics_jax.batch import BatchShape, Encoded
from idefics_jax.documents import Part
from idefics_jax.inference.generate import Decoding, generate
from idefics_jax.model import Model
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.processor import Processor, first_fit
from idefics_jax.sharding import use_mesh

# Sizes are rounded up to these, so that most prompts share a program.
TOKEN_BUCKET, PATCH_BUCKET, IMAGE_BUCKET = 64, 64, 4


def default_decoding(processor: Processor, *, max_new_tokens: int) -> Decoding:
    """Greedy, ending with a turn or a document, never choosing the tokens that stand for an image.

    The token loop runs unrolled but on GPU, where it is not measured: a scan copies every weight at every token on CPU,
    and the cache on TPU, where by the compiler's estimate a token of 32 rows takes 8.9 ms so and 2.6 ms unrolled (8B on
    v5e-8).
    """
    tokenizer = processor.tokenizer
    return Decoding(
        max_new_tokens=max_new_tokens,
        stop_ids=(tokenizer.eos_id, tokenizer.end_of_utterance_id),
        banned_ids=(tokenizer.fake_token_id, tokenizer.image_token_id),
        temperature=0.0,
        top_p=1.0,
        unroll=jax.default_backend() != "gpu",
    )


def bucket(encoded: Sequence[Encoded], *, rows: int, patch_dim: int) -> BatchShape:
    """Returns the sizes that hold any `rows` of these prompts, rounded up to buckets.

    Of all lengths of a vision row the one is taken that leaves the fewest patches in all; of equals the shortest.
    """

    def up(size: int, step: int) -> int:
        return -(-max(size, 1) // step) * step

    images = [[height * width for height, width in prompt.grids] for prompt in encoded]
    largest = max((size for own in images for size in own), default=0)
    most = max((sum(own) for own in images), default=0)
    lengths = range(up(largest, PATCH_BUCKET), up(most, PATCH_BUCKET) + 1, PATCH_BUCKET)

    def vision_rows(length: int) -> int:
        return max((row + 1 for own in images for row, _ in first_fit(own, length)), default=1)

    patches = min(lengths, key=lambda length: vision_rows(length) * length)
    return BatchShape(
        rows=rows,
        tokens=up(max((len(prompt.tokens) for prompt in encoded), default=0), TOKEN_BUCKET),
        vision_rows=vision_rows(patches),
        patches=patches,
        images=up(max((len(own) for own in images), default=0), IMAGE_BUCKET),
        patch_dim=patch_dim,
    )


def answers(
    model: Model, prompts: Sequence[Sequence[Part]], decoding: Decoding, *, rows: int, seed: int
) -> Iterator[str]:
    """Yields the model's continuation of each prompt, in order.

    Args:
      model: from `idefics_jax.load`, with a processor; it runs on the devices that its parameters lie on.
      prompts: the parts of each prompt.
      decoding: how to choose tokens, when to end.
      rows: prompts answered at once.
      seed: of the sampling.

    Raises:
      RejectedImage: an image cannot be used.
    """
    module, processor = Idefics2(model.config, dtype=model.dtype), model.processor
    encoded = [processor.encode(parts, add_bos=True, add_eos=False) for parts in prompts]
    shape = bucket(encoded, rows=rows, patch_dim=model.config.vision_config.patch_dim)
    rng = jax.random.key(seed)
    for start in range(0, len(prompts), rows):
        batch, _ = processor(prompts[start : start + rows], pad_side="left", shape=shape)
        if not any(prompt.grids for prompt in encoded):
            batch = {name: array for name, array in batch.items() if "patch" not in name}
        with use_mesh(model.mesh, model.rules):
            tokens, lengths = generate(
                module, {"params": model.params}, batch, decoding, jax.random.fold_in(rng, start)
            )
        tokens, lengths = jax.device_get((tokens, lengths))
        for row in range(min(rows, len(prompts) - start)):
            yield processor.decode(tokens[row, : lengths[row]].tolist()).strip()
