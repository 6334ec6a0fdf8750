"""What chance changes about a document: the size and splitting of its images, the order of its turns.

Chance is the element's own: it depends on the source's seed, the epoch and the row, so a resumed run repeats it, and
every epoch sees the row otherwise. Only numbers are decided here; pixels are made after packing.
"""

import dataclasses
from typing import Any

import numpy as np

from idefics_jax.documents import Document, Image
from idefics_jax.errors import UserError

# The least factor of up-scaling (the authors' code).
_LEAST = 1.5


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Chances, each at a value that changes nothing by default.

    Attributes:
      split_share: share of documents whose images are split into four and the whole; None leaves it to the processor.
      upscale: chance that an image is enlarged before the processor's rules (the longest edge among them) see it.
      upscale_to: largest factor; it is drawn from a triangle from 1.5 up to here, its peak.
      shuffle_turns: whether the turns of a conversation come in random order.
    """

    split_share: float | None = None
    upscale: float = 0.0
    upscale_to: float = 2.0
    shuffle_turns: bool = False

    def __post_init__(self):
        for name in ("split_share", "upscale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"augmentation.{name} is {value!r}; it must lie in [0, 1]")
        if not self.upscale_to >= _LEAST:
            raise UserError(f"augmentation.upscale_to is {self.upscale_to!r}; it must be at least {_LEAST}")

    @property
    def is_random(self) -> bool:
        """Whether a row may give another document in another epoch."""
        return self.split_share is not None or self.upscale > 0 or self.shuffle_turns

    def of_row(self, values: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Shuffles the turns of a conversation's row."""
        if not self.shuffle_turns or not values["texts"]:
            return values
        return {**values, "texts": [values["texts"][turn] for turn in rng.permutation(len(values["texts"]))]}

    def of_document(self, document: Document, rng: np.random.Generator) -> Document:
        """Decides how each image of a document is read; all pieces of a document that is cut decide alike."""
        split = None if self.split_share is None else bool(rng.random() < self.split_share)

        def of_image(image: Image) -> Image:
            chance, factor = rng.random(), rng.triangular(_LEAST, self.upscale_to, self.upscale_to)
            return dataclasses.replace(image, split=split, upscale=factor if chance < self.upscale else 1.0)

        parts = tuple(of_image(part) if isinstance(part, Image) else part for part in document.parts)
        return dataclasses.replace(document, parts=parts)
