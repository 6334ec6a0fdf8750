"""What chance changes about a document: the size and splitting of its images, the order and form of its turns.

Chance is the element's own: it depends on the source's seed, the epoch and the row, so a resumed run repeats it, and
every epoch sees the row otherwise. Only numbers are decided here; pixels are made after packing.
"""

import dataclasses
from typing import Any

import numpy as np

from data_pipelines import forms
from data_pipelines.rejection import FILTERED
from idefics_jax.documents import Document, Image
from idefics_jax.errors import UserError

# The least factor of up-scaling (the authors' code).
_LEAST = 1.5
# The reason of turns that max_turns leaves out.
BEYOND_MAX_TURNS = f"{FILTERED}turn_beyond_max_turns"


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Chances, each at a value that changes nothing by default.

    Attributes:
      split_share: share of documents whose images are split into four and the whole; None leaves it to the processor.
      upscale: chance that an image is enlarged before the processor's rules (the longest edge among them) see it.
      upscale_to: largest factor; it is drawn from a triangle from 1.5 up to here, its peak.
      shuffle_turns: whether the turns of a conversation come in random order.
      max_turns: how many turns are kept, after shuffling (7 in the authors' code); None for all. The others are left
        out of this epoch, and counted as BEYOND_MAX_TURNS.
      suffixes: what asks for short answers (forms.BRIEF is one); each question gets one of them, drawn at random, at
        its end. Questions with choices get none.
      sentences: whether answers get a capital first letter and a final period; those of choices stay.
      line_break: chance of a line break before a question (0.05 in the authors' code).
    """

    split_share: float | None = None
    upscale: float = 0.0
    upscale_to: float = 2.0
    shuffle_turns: bool = False
    max_turns: int | None = None
    suffixes: tuple[str, ...] = ()
    sentences: bool = False
    line_break: float = 0.0

    def __post_init__(self):
        for name in ("split_share", "upscale", "line_break"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"augmentation.{name} is {value!r}; it must lie in [0, 1]")
        if not self.upscale_to > _LEAST:
            raise UserError(f"augmentation.upscale_to is {self.upscale_to!r}; it must be more than {_LEAST}")
        if self.max_turns is not None and self.max_turns < 1:
            raise UserError(f"augmentation.max_turns is {self.max_turns!r}; it must be at least 1, or None for all")

    @property
    def is_random(self) -> bool:
        """Whether a row may give another document in another epoch."""
        of_turns = self.shuffle_turns or self.line_break > 0 or len(self.suffixes) > 1
        return self.is_random_of_images or of_turns

    @property
    def is_random_of_images(self) -> bool:
        """Whether chance changes how images are read; if not, `of_document` returns its document."""
        return self.split_share is not None or self.upscale > 0

    @property
    def of_turns_alone(self) -> tuple[str, ...]:
        """Names the settings in use that only a conversation can have."""
        names = ("shuffle_turns", "max_turns", "suffixes", "sentences", "line_break")
        return tuple(name for name in names if getattr(self, name))

    def of_turns(self, turns: list[dict[str, Any] | None], rng: np.random.Generator) -> list[dict[str, Any] | None]:
        """Orders and words the turns of a conversation; turns that lack something are left as they are.

        Raises:
          BadRow: see forms.written_out.
        """
        order = rng.permutation(len(turns)) if self.shuffle_turns else range(len(turns))
        return [self._of_turn(turns[place], rng) for place in order[: self.max_turns]]

    def _of_turn(self, turn: dict[str, Any] | None, rng: np.random.Generator) -> dict[str, Any] | None:
        breaks, drawn = rng.random() < self.line_break, int(rng.integers(max(1, len(self.suffixes))))
        if turn is None or turn.get("user") is None or turn.get("assistant") is None:
            return turn
        written = forms.written_out(turn)
        user, answer = written["user"], written["assistant"]
        if written is turn:
            user += self.suffixes[drawn] if self.suffixes else ""
            answer = forms.as_sentence(answer) if self.sentences else answer
        return {"user": f"\n{user}" if breaks else user, "assistant": answer}

    def of_document(self, document: Document, rng: np.random.Generator) -> Document:
        """Decides how each image of a document is read; all pieces of a document that is cut decide alike."""
        split = None if self.split_share is None else bool(rng.random() < self.split_share)

        def of_image(image: Image) -> Image:
            chance, factor = rng.random(), rng.triangular(_LEAST, self.upscale_to, self.upscale_to)
            return dataclasses.replace(image, split=split, upscale=factor if chance < self.upscale else 1.0)

        parts = tuple(of_image(part) if isinstance(part, Image) else part for part in document.parts)
        return dataclasses.replace(document, parts=parts)
