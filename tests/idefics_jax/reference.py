"""Tiny Idefics2 models of transformers beside ours, and documents laid out for both.

Every parameter of the reference is drawn at random, norms and biases too: at their initial ones and zeros a swapped
or forgotten norm would not show.
"""

import dataclasses
import functools

import jax
import numpy as np
import torch
import transformers
from transformers.models.idefics2.modeling_idefics2 import Idefics2RMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from idefics_jax.batch import BatchShape, Encoded, empty_batch, place_document
from idefics_jax.config import Idefics2Config
from idefics_jax.convert.hf import from_hf
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.param_transforms.paths import flatten
from idefics_jax.training.losses import next_token_loss

# Tolerances in float32: a part alone, the whole tiny model.
LEAF, WHOLE = 1e-5, 1e-4

PATCH, LATENTS, PER_SIDE = 4, 3, 10
VOCAB, FAKE, IMAGE = 99, 96, 97
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": PER_SIDE * PATCH,
    "patch_size": PATCH,
    "layer_norm_eps": 3e-3,  # none of the three is another's, or small beside what is normed
}
PERCEIVER = {
    "hidden_size": 32,
    "resampler_n_latents": LATENTS,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "resampler_head_dim": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 2e-3,
}
TEXT = {
    "model_type": "mistral",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rms_norm_eps": 4e-3,
    "sliding_window": None,
}

# Two test workers share the machine: torch's own threads would only get in their way.
torch.set_num_threads(1)

# Optimising programs this small takes XLA longer than all the rest of a test.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    },
)


@dataclasses.dataclass(frozen=True)
class Document:
    """Token ids, and the images that the `<image>` tokens among them stand for.

    Attributes:
      tokens: int32 [n].
      images: uint8 [height, width, 3] each.
    """

    tokens: np.ndarray
    images: tuple[np.ndarray, ...]

    @property
    def encoded(self) -> Encoded:
        grids = tuple((image.shape[0] // PATCH, image.shape[1] // PATCH) for image in self.images)
        return Encoded(self.tokens, ~np.isin(self.tokens, (IMAGE, FAKE)), (), grids)


def document(rng: np.random.Generator, *parts: int | tuple[int, int]) -> Document:
    """A random document; each part is a number of words, or the (height, width) of an image in pixels."""
    tokens, images = [], []
    for part in parts:
        if isinstance(part, tuple):
            tokens += [FAKE, *[IMAGE] * LATENTS, FAKE]
            images.append(rng.integers(0, 256, (*part, 3), dtype=np.uint8))
        else:
            # Never 0, which some tests take for padding.
            tokens += rng.integers(1, FAKE, part).tolist()
    return Document(np.array(tokens, np.int32), tuple(images))


@dataclasses.dataclass(frozen=True)
class Twin:
    """One set of weights in both implementations."""

    hf: transformers.Idefics2ForConditionalGeneration
    config: Idefics2Config
    params: dict

    @property
    def model(self) -> Idefics2:
        return Idefics2(self.config)

    def logits(self, batch: dict) -> list[np.ndarray]:
        """Our logits of every document of a batch: [n, V] each, as `per_document` orders them."""
        return per_document(batch, apply(self.model, self.params, batch))

    def logits_hf(self, documents: list[Document], *, side: str = "right") -> list[np.ndarray]:
        """The reference's logits of every document: [n, V] each."""
        inputs = hf_inputs(documents, side=side)
        with torch.no_grad():
            logits = self.hf(**inputs).logits.numpy()
        return [row[mask == 1] for row, mask in zip(logits, inputs["attention_mask"].numpy(), strict=True)]

    def loss_and_grads(self, batch: dict) -> tuple[float, dict]:
        """Our mean loss over the trained tokens, and the tree of its gradients."""

        def loss(params, batch):
            hidden, _ = self.model.apply({"params": params}, batch)

            def logits(params, x, *_):
                return self.model.apply({"params": params}, x, method="logits")

            sums = next_token_loss(hidden, batch["tokens"], batch["loss_weights"], params, logits, chunk=8)
            return sums["loss"] / sums["weight"]

        value, grads = jit(jax.value_and_grad(loss))(self.params, batch)
        return float(value), grads

    def loss_and_grads_hf(self, documents: list[Document], *, side: str = "right") -> tuple[float, dict]:
        """The reference's, its gradients renamed and turned like weights."""
        inputs = hf_inputs(documents, side=side)
        self.hf.zero_grad()
        loss = self.hf(**inputs, labels=labels(inputs)).loss
        loss.backward()
        return loss.item(), from_hf({name: p.grad.numpy() for name, p in self.hf.named_parameters()}, self.config)


def twin(*, vision: dict | None = None, perceiver: dict | None = None, text: dict | None = None, **top) -> Twin:
    """Builds the reference, with the given changes to the tiny config, and ours with its weights."""
    hf_config = transformers.Idefics2Config(
        vision_config={**VISION, **(vision or {})},
        perceiver_config={**PERCEIVER, **(perceiver or {})},
        text_config={**TEXT, **(text or {})},
        image_token_id=IMAGE,
        **top,
    )
    hf_config._attn_implementation = "eager"
    hf = transformers.Idefics2ForConditionalGeneration(hf_config).eval()
    randomize(hf)
    config = Idefics2Config.from_hf(hf_config.to_dict())
    return Twin(hf, config, converted(hf, config))


def converted(hf: torch.nn.Module, config: Idefics2Config) -> dict:
    """Our parameters with the reference's present weights."""
    return from_hf({name: x.numpy() for name, x in hf.state_dict().items()}, config)


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    """Draws every parameter: norm scales about 1, biases about 0, weights so that activations keep their size."""
    generator = torch.Generator().manual_seed(0)
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "bias":
                parameter.copy_(0.3 * noise)
            elif isinstance(owner, (torch.nn.LayerNorm, Idefics2RMSNorm, MistralRMSNorm)):
                parameter.copy_(1 + 0.3 * noise)
            elif isinstance(owner, (torch.nn.Linear, torch.nn.Conv2d)):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise)


@functools.partial(jit, static_argnums=0)
def apply(model: Idefics2, params: dict, batch: dict) -> jax.Array:
    """Our logits of a batch, compiled."""
    return model.apply({"params": params}, batch, method="full_logits")


def hf_inputs(documents: list[Document], *, side: str = "right") -> dict[str, torch.Tensor]:
    """One document a row, as transformers' processor gives them: tokens and pixels padded, with their masks."""
    length = max(len(document.tokens) for document in documents)
    ids, mask = np.zeros((2, len(documents), length), np.int64)
    for row, document in enumerate(documents):
        begin = length - len(document.tokens) if side == "left" else 0
        ids[row, begin : begin + len(document.tokens)] = document.tokens
        mask[row, begin : begin + len(document.tokens)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    count = max(len(document.images) for document in documents)
    if count:
        sizes = [image.shape for document in documents for image in document.images]
        height, width, _ = np.max(sizes, axis=0)
        pixels = np.zeros((len(documents), count, 3, height, width), np.float32)
        pixel_mask = np.zeros((len(documents), count, height, width), bool)
        for row, document in enumerate(documents):
            for i, image in enumerate(document.images):
                h, w, _ = image.shape
                pixels[row, i, :, :h, :w] = normalized(image).transpose(2, 0, 1)
                pixel_mask[row, i, :h, :w] = True
        inputs |= {"pixel_values": pixels, "pixel_attention_mask": pixel_mask}
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def normalized(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32 as the reference's processor scales: by 1 / 255, then mean and standard deviation 0.5."""
    return ((pixels.astype(np.float32) / 255 - 0.5) / 0.5).astype(np.float32)


def labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the reference is trained to predict: all but image tokens, padding, and each document's first token."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = (mask == 1) & (torch.cumsum(mask, dim=1) == 1)
    return ids.masked_fill((mask == 0) | first | (ids == IMAGE) | (ids == FAKE), -100)


def cut(image: np.ndarray, patch: int) -> np.ndarray:
    """uint8 [h, w, 3] -> [rows * columns, patch * patch * 3], without what is beyond the last whole patch."""
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    grid = image[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch, 3)
    return grid.swapaxes(1, 2).reshape(rows * columns, -1)


def batch(rows: list[list[Document]], *, side: str = "right", vision_rows: int = 1, spare: int = 0) -> dict:
    """Our batch of rows of documents, with `spare` unused tokens, patches and images in every row.

    Images are dealt to the vision row that has most room.
    """
    slots, fill = zip(*(_deal(documents, vision_rows) for documents in rows), strict=True)
    lengths = [sum(len(document.tokens) for document in documents) for documents in rows]
    counts = [sum(len(document.images) for document in documents) for documents in rows]
    shape = BatchShape(
        rows=len(rows),
        tokens=max(lengths) + spare,
        vision_rows=vision_rows,
        patches=max(1, np.max(fill).item() + spare),
        images=max(1, max(counts) + spare),
        patch_dim=3 * PATCH**2,
    )
    filled = empty_batch(shape)
    for row, documents in enumerate(rows):
        token = shape.tokens - lengths[row] if side == "left" else 0
        image = 0
        for number, document in enumerate(documents):
            place_document(
                filled,
                row,
                encoded=document.encoded,
                patches=[cut(pixels, PATCH) for pixels in document.images],
                segment=number + 1,
                token_offset=token,
                image_offset=image,
                vision_slots=slots[row][image : image + len(document.images)],
                positions_per_side=PER_SIDE,
            )
            token, image = token + len(document.tokens), image + len(document.images)
    return filled


def _deal(documents: list[Document], vision_rows: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Returns the (vision row, first patch) of every image, and how many patches each vision row then holds."""
    slots, fill = [], [0] * vision_rows
    for document in documents:
        for rows, columns in document.encoded.grids:
            vision_row = int(np.argmin(fill))
            slots.append((vision_row, fill[vision_row]))
            fill[vision_row] += rows * columns
    return slots, fill


def per_document(batch: dict, values: jax.Array) -> list[np.ndarray]:
    """Cuts [B, T, ...] into one array for each document, row by row, in the order of the segments."""
    values = np.asarray(values)
    return [
        values[row][segments == segment]
        for row, segments in enumerate(batch["segment_ids"])
        for segment in range(1, segments.max() + 1)
    ]


def assert_close(ours: list[np.ndarray], theirs: list[np.ndarray], tolerance: float) -> None:
    """Asserts that arrays agree pairwise."""
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=tolerance, atol=tolerance)


def assert_same_grads(ours: dict, theirs: dict, tolerance: float) -> None:
    """Asserts that each leaf's gradients agree to `tolerance` of the largest of them.

    One that is zero but for rounding (softmax does not see the bias of the keys) has no size of its own: none is held
    to less than the rounding of the largest gradient of all.
    """
    ours, theirs = flatten(ours), flatten(theirs)
    assert set(ours) == set(theirs)
    rounding = np.finfo(np.float32).eps * max(np.abs(grad).max() for grad in theirs.values())
    for path, grad in theirs.items():
        atol = max(tolerance * np.abs(grad).max(), rounding)
        np.testing.assert_allclose(ours[path], grad, rtol=0, atol=atol, err_msg=path)
