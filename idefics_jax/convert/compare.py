"""Our logits beside those of transformers, on the same inputs.

torch and transformers are imported here and nowhere else in the package; they are not needed to convert.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import scipy.special
from etils import epath

from idefics_jax.config import Idefics2Config
from idefics_jax.convert.hf_folder import HfFolder
from idefics_jax.errors import UserError
from idefics_jax.image_gate import RejectedImage, open_image
from idefics_jax.interop import hf_batch, to_hf_positions
from idefics_jax.model import find_model, load

# float32: largest difference, against the largest logit where that is above 1. bfloat16: KL and top-1.
MAX_ABS, MAX_KL, MIN_TOP1 = 1e-4, 1e-3, 0.99
MAX_PIXELS = 64_000_000


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far our logits are from the reference's.

    Attributes:
      positions: tokens compared.
      largest_logit: largest absolute logit of the reference.
      max_abs: largest absolute difference of a logit.
      kl: mean over tokens of KL(reference || ours), in nats.
      top1: share of tokens whose most likely next token is the same, or was as likely within one rounding of `dtype`.
      dtype: "float32" or "bfloat16", of both computations.
    """

    positions: int
    largest_logit: float
    max_abs: float
    kl: float
    top1: float
    dtype: str

    @property
    def agrees(self) -> bool:
        """Whether the difference is one of rounding in `dtype`."""
        close = self.kl <= MAX_KL and self.top1 >= MIN_TOP1
        return close and (self.dtype != "float32" or self.max_abs <= MAX_ABS * max(1.0, self.largest_logit))

    def __str__(self) -> str:
        bound = MAX_ABS * max(1.0, self.largest_logit)
        rows = (
            ("max abs", f"{self.max_abs:.3g}", f"<= {bound:.3g}" if self.dtype == "float32" else ""),
            ("KL (nats)", f"{self.kl:.3g}", f"<= {MAX_KL:g}"),
            ("top-1 agreement", f"{self.top1:.4f}", f">= {MIN_TOP1:g}"),
        )
        table = "\n".join(f"{name:<16} {value:>10}  {wanted}".rstrip() for name, value, wanted in rows)
        verdict = "the two agree" if self.agrees else "the two DIFFER"
        return f"{self.positions} tokens, {self.dtype}, largest logit {self.largest_logit:.3g}\n{table}\n{verdict}"


def compare_logits(reference: np.ndarray, ours: np.ndarray, dtype: str) -> Comparison:
    """Compares logits [n, V] of n tokens, computed in `dtype`."""
    reference, ours = reference.astype(np.float64), ours.astype(np.float64)
    best = reference.max(axis=-1)
    chosen = np.take_along_axis(reference, ours.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    log_p, log_q = (scipy.special.log_softmax(x, axis=-1) for x in (reference, ours))
    return Comparison(
        positions=len(reference),
        largest_logit=float(np.abs(reference).max()),
        max_abs=float(np.abs(reference - ours).max()),
        kl=float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()),
        top1=float((best - chosen <= jnp.finfo(dtype).eps * np.abs(best)).mean()),
        dtype=dtype,
    )


def compare(
    hf: epath.PathLike, ours: epath.PathLike, *, images: Sequence[str], prompt: str | None, seed: int, dtype: str
) -> Comparison:
    """Runs both models on one input.

    Args:
      hf: Hugging Face folder, run by transformers.
      ours: what `idefics_jax.load` takes; the same folder, to compare the conversion itself.
      images: files shown before the prompt.
      prompt: text; None and no images = random tokens and images drawn from `seed`.
      seed: of the random inputs.
      dtype: "float32" or "bfloat16", of both computations.

    Raises:
      UserError: torch or transformers is not installed, a folder or image cannot be read, or the two folders hold
        models of different sizes.
    """
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be 0 or more")
    torch, transformers = _reference()
    HfFolder(hf)  # refuses pickles and damaged files before transformers sees them
    config = Idefics2Config.load(hf)
    if Idefics2Config.load(find_model(ours)) != config:
        raise UserError(f"{hf} and {ours} hold models of different configs; give two that should be the same")
    if images or prompt is not None:
        inputs = _given_inputs(transformers, hf, images, prompt or "")
    else:
        inputs = {name: torch.from_numpy(array) for name, array in random_inputs(config, seed).items()}
    with torch.inference_mode():
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            hf, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
        )
        reference = model.eval()(**inputs).logits.float().numpy()
    del model
    batch, places = hf_batch(**inputs, config=config)
    with jax.default_matmul_precision("highest"):
        logits = to_hf_positions(load(ours, dtype=getattr(jnp, dtype))(batch), places)
    real = places >= 0
    return compare_logits(reference[real], logits[real], dtype)


def random_inputs(config: Idefics2Config, seed: int) -> dict[str, np.ndarray]:
    """Two rows as transformers' processor gives them: two images and text, and one smaller image, padded on the left.

    Args:
      config: sizes and ids.
      seed: of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    patch, latents = config.vision_config.patch_size, config.perceiver_config.resampler_n_latents
    side = min(4, config.vision_config.positions_per_side) * patch
    image = [config.image_token_id] * latents
    words = rng.integers(0, config.text_config.vocab_size - 1, (4, 8))
    words = (words + (words >= config.image_token_id)).tolist()  # any id but the image's
    rows = [words[0] + image + words[1] + image + words[2], words[3] + image]
    length = len(rows[0])
    pixels = np.zeros((2, 2, 3, side, side), np.float32)
    real = np.zeros((2, 2, side, side), np.int64)
    for place in ((0, 0), (0, 1), (1, 0)):
        height, width = rng.integers(patch, side + 1, 2)
        pixels[place][:, :height, :width] = rng.uniform(-1, 1, (3, height, width))
        real[place][:height, :width] = 1
    return {
        "input_ids": np.array([[0] * (length - len(row)) + row for row in rows], np.int64),
        "attention_mask": np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int64),
        "pixel_values": pixels,
        "pixel_attention_mask": real,
    }


def _given_inputs(transformers: Any, hf: epath.PathLike, images: Sequence[str], prompt: str) -> dict[str, Any]:
    """Runs transformers' own processor, so that only the models are compared."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(hf, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{hf} holds no processor that transformers can read; put its files there, or leave out --image and "
            "--prompt to compare on random inputs"
        ) from error
    pictures = [_open(Path(path)) for path in images]
    text = "<image>" * len(pictures) + prompt
    return dict(processor(text=text, images=pictures or None, return_tensors="pt"))


def _open(path: Path) -> PIL.Image.Image:
    try:
        return open_image(path.read_bytes(), max_pixels=MAX_PIXELS)
    except (OSError, RejectedImage) as error:
        raise UserError(f"--image {path}: {error}") from error


def _reference() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"compare runs the reference, and {error.name} is not installed; pip install -r requirements-test.txt"
        ) from error
    return torch, transformers
