"""The processor: documents to token ids and image patches, as Idefics2Processor of transformers 5.23 does.

A document becomes ids part by part. Text is encoded alone; the control tokens (`<s>`, `<image>`,
`<fake_token_around_image>`, `<end_of_utterance>`) are spliced between the encoded stretches as ids, so no text can
forge one. The ids are nevertheless those the reference finds in its one flat string.
"""

import dataclasses

import numpy as np

from idefics_jax import images as images_lib
from idefics_jax.documents import EndOfUtterance, Image, Part, Text
from idefics_jax.images import ImageRules
from idefics_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A document as the packer sees it: exact sizes, nothing decoded.

    Attributes:
      tokens: int32 [n].
      trained: bool [n], whether the token counts as a target; never true for image tokens and `<s>`.
      images: the encoded bytes of each image, in reading order.
      grids: (rows, columns) of patches of every image after splitting, in the order of their tokens.
    """

    tokens: np.ndarray
    trained: np.ndarray
    images: tuple[bytes, ...]
    grids: tuple[tuple[int, int], ...]


class Processor:
    """Tokenizer, image rules and the number of `<image>` tokens an image takes."""

    def __init__(self, tokenizer: Tokenizer, image_rules: ImageRules, num_latents: int):
        if isinstance(num_latents, bool) or not isinstance(num_latents, int) or num_latents < 1:
            raise ValueError(f"processor.num_latents is {num_latents!r}; it must be a whole number of at least 1")
        self.tokenizer = tokenizer
        self.image_rules = image_rules
        self.num_latents = num_latents

    def encode(self, parts: tuple[Part, ...], *, add_bos: bool, add_eos: bool) -> Encoded:
        """Turns a document's parts into ids; images are measured from their headers, not decoded.

        Neighbouring texts are encoded as one, and an id is trained as the text its first character stands in. The
        closing `</s>` is trained as the last part is.

        Raises:
          RejectedImage: an image does not pass the gate.
        """
        tokens, trained, images, grids = [], [], [], []

        def put(ids, flags):
            tokens.extend(ids)
            trained.extend(flags)

        if add_bos:
            put([self.tokenizer.bos_id], [False])
        opening = len(tokens)
        for run in _runs(parts):
            if isinstance(run, Image):
                ids = self._image_ids(after_image=len(tokens) > opening and tokens[-1] == self.tokenizer.fake_token_id)
                put(ids, [False] * len(ids))
                images.append(run.data)
                grids.extend(images_lib.patch_grids(run.data, self.image_rules))
            elif isinstance(run, EndOfUtterance):
                put([self.tokenizer.end_of_utterance_id], [run.trained])
            else:
                previous = tokens[-1] if len(tokens) > opening else None
                put(*self._text_ids(run, previous))
        if add_eos:
            put([self.tokenizer.eos_id], [bool(parts) and getattr(parts[-1], "trained", False)])
        return Encoded(np.array(tokens, np.int32), np.array(trained, bool), tuple(images), tuple(grids))

    def _image_ids(self, *, after_image: bool) -> list[int]:
        """One fake token before, between and after the images; the one before is shared with an image just closed."""
        fake = self.tokenizer.fake_token_id
        ids = [] if after_image else [fake]
        for _ in range(self.image_rules.images_per_image):
            ids += [self.tokenizer.image_token_id] * self.num_latents + [fake]
        return ids

    def _text_ids(self, texts: list[Text], previous: int | None) -> tuple[list[int], list[bool]]:
        """Encodes neighbouring texts as one; `previous` is the token before them, None where they open the document."""
        text = "".join(part.text for part in texts)
        # The reference gives a word that touches an image its word boundary back, except before "<".
        space = previous == self.tokenizer.fake_token_id and text != "" and not (text[0].isspace() or text[0] == "<")
        ids, begins = self.tokenizer.encode_spans(" " + text if space else text, at_start=previous is None)
        flags = np.repeat([part.trained for part in texts], [len(part.text) for part in texts])
        return ids, [bool(flags[max(begin - space, 0)]) for begin in begins]


def _runs(parts):
    """Yields images and ends of utterances as they are, and each stretch of neighbouring texts as a list.

    Empty texts vanish, as in a flat string: two images with nothing between them touch.
    """
    texts = []
    for part in parts:
        if isinstance(part, Text):
            if part.text:
                texts.append(part)
            continue
        if texts:
            yield texts
            texts = []
        yield part
    if texts:
        yield texts
