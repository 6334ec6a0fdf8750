"""The processor: documents to token ids, image patches and batches, as Idefics2Processor of transformers 5.23 does.

A document becomes ids part by part. Text is encoded alone; the control tokens (`<s>`, `<image>`,
`<fake_token_around_image>`, `<end_of_utterance>`) are spliced between the encoded stretches as ids, so no text can
forge one. The ids are nevertheless those the reference finds in its one flat string.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from idefics_jax import images as images_lib
from idefics_jax import processor_folder, settings
from idefics_jax.batch import Batch, BatchShape, Encoded, empty_batch, place_document
from idefics_jax.documents import EndOfUtterance, Image, Part, Text
from idefics_jax.errors import UserError
from idefics_jax.images import ImageRules, RejectedImage
from idefics_jax.tokenizer import Tokenizer


class Processor:
    """Tokenizer, image rules, and the number of `<image>` tokens an image takes."""

    def __init__(self, tokenizer: Tokenizer, image_rules: ImageRules, num_latents: int):
        if isinstance(num_latents, bool) or not isinstance(num_latents, int) or num_latents < 1:
            raise UserError(f"num_latents is {num_latents!r}; it must be a whole number of at least 1")
        self.tokenizer = tokenizer
        self.image_rules = image_rules
        self.num_latents = num_latents

    @classmethod
    def load(cls, folder: epath.PathLike) -> "Processor":
        """Reads a Hugging Face Idefics2 folder, or one written by `save`; raises UserError naming what is amiss."""
        return cls(*processor_folder.read(folder))

    def with_image_rules(self, changes: Mapping[str, Any]) -> "Processor":
        """Returns a processor with some fields of its image rules changed; raises UserError naming a wrong one."""
        rules = settings.build(ImageRules, {**dataclasses.asdict(self.image_rules), **changes}, "config.image_rules")
        return Processor(self.tokenizer, rules, self.num_latents)

    def save(self, folder: epath.PathLike) -> None:
        """Writes a folder that transformers' AutoProcessor loads, with the same ids and pixels."""
        processor_folder.write(folder, self.tokenizer, self.image_rules, self.num_latents)

    def encode(self, parts: Sequence[Part], *, add_bos: bool, add_eos: bool) -> Encoded:
        """Turns a document's parts into ids; images are measured from their headers, not decoded.

        Neighbouring texts are encoded as one, and an id is trained as the text it begins in. The closing `</s>` is
        trained as the last part is.

        Raises:
          RejectedImage: an image does not pass the gate.
          UserError: something is not a part.
        """
        tokens: list[int] = [self.tokenizer.bos_id] if add_bos else []
        trained: list[bool] = [False] * len(tokens)
        grids: list[tuple[int, int]] = []
        images: list[Image] = []
        previous = None
        for run in _runs(parts):
            if isinstance(run, Image):
                rules = self._rules(run)
                ids = self._image_ids(previous, rules)
                flags = [False] * len(ids)
                images.append(run)
                grids += images_lib.patch_grids(run.data, rules, run.upscale)
            elif isinstance(run, EndOfUtterance):
                ids, flags = [self.tokenizer.end_of_utterance_id], [run.trained]
            else:
                ids, flags = self._text_ids(run, previous)
            tokens += ids
            trained += flags
            previous = tokens[-1]
        if add_eos:
            tokens.append(self.tokenizer.eos_id)
            trained.append(bool(parts) and not isinstance(parts[-1], Image) and parts[-1].trained)
        return Encoded(np.array(tokens, np.int32), np.array(trained, bool), tuple(images), tuple(grids))

    def patches(self, encoded: Encoded, out: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Decodes a document's images.

        Args:
          encoded: the document.
          out: arrays to write to, one for each of `encoded.grids`; by default new ones.

        Returns:
          uint8 [rows * columns, C] for each of `encoded.grids`.

        Raises:
          RejectedImage: an image is damaged; those before it are written then.
        """
        patches: list[np.ndarray] = []
        for image in encoded.images:
            rules, done = self._rules(image), len(patches)
            places = None if out is None else out[done : done + rules.images_per_image]
            patches += images_lib.image_patches(image.data, rules, image.upscale, out=places)
        return patches

    def __call__(
        self, documents: Sequence[Sequence[Part]], *, pad_side: str, shape: BatchShape | None = None
    ) -> tuple[Batch, BatchShape]:
        """Builds a batch of one document a row, `<s>` before each.

        Args:
          documents: the parts of each (`chat.chat_parts` makes them of a conversation).
          pad_side: "left" for generation, "right" for scoring.
          shape: the sizes to fill, for a program already compiled; by default the smallest that hold everything,
            with a vision row for each image.

        Raises:
          UserError: a document has more tokens, images or patches than the shape holds.
          RejectedImage: an image does not pass the gate, is damaged, or has more patches than a vision row.
        """
        if pad_side not in ("left", "right"):
            raise UserError(f"pad_side is {pad_side!r}; it must be 'left' or 'right'")
        encoded = [self.encode(parts, add_bos=True, add_eos=False) for parts in documents]
        shape = shape or self._smallest(encoded)
        self._check_rows(encoded, shape)
        slots = [_vision_slots(document, shape) for document in encoded]
        batch = empty_batch(shape)
        for row, document in enumerate(encoded):
            place_document(
                batch,
                row,
                encoded=document,
                patches=self.patches(document),
                segment=1,
                token_offset=shape.tokens - len(document.tokens) if pad_side == "left" else 0,
                image_offset=0,
                vision_slots=slots[row],
                positions_per_side=self.image_rules.positions_per_side,
            )
        return batch, shape

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, without special tokens."""
        return self.tokenizer.decode(ids)

    def _rules(self, image: Image) -> ImageRules:
        return self.image_rules if image.split is None else dataclasses.replace(self.image_rules, split=image.split)

    def _image_ids(self, previous: int | None, rules: ImageRules) -> list[int]:
        """A fake token before, between and after the images; an image that touches another shares the first."""
        fake = self.tokenizer.fake_token_id
        between = [self.tokenizer.image_token_id] * self.num_latents + [fake]
        return ([] if previous == fake else [fake]) + between * rules.images_per_image

    def _text_ids(self, texts: list[Text], previous: int | None) -> tuple[list[int], list[bool]]:
        """Encodes neighbouring texts as one; `previous` is the token before them, None where they open the document."""
        text = "".join(part.text for part in texts)
        # As the reference: a word that touches an image gets its word boundary back, except before "<".
        space = previous == self.tokenizer.fake_token_id and not (text[0].isspace() or text[0] == "<")
        text = " " + text if space else text
        if len({part.trained for part in texts}) == 1:
            ids = self.tokenizer.encode(text, at_start=previous is None)
            return ids, [texts[0].trained] * len(ids)
        ids, begins = self.tokenizer.encode_spans(text, at_start=previous is None)
        flags = np.repeat([part.trained for part in texts], [len(part.text) for part in texts])
        return ids, [bool(flags[max(begin - space, 0)]) for begin in begins]

    def _smallest(self, encoded: Sequence[Encoded]) -> BatchShape:
        images = max((len(document.grids) for document in encoded), default=0)
        return BatchShape(
            rows=max(1, len(encoded)),
            tokens=max((len(document.tokens) for document in encoded), default=1),
            vision_rows=max(1, images),
            patches=max((rows * columns for document in encoded for rows, columns in document.grids), default=1),
            images=max(1, images),
            patch_dim=3 * self.image_rules.patch_size**2,
        )

    def _check_rows(self, encoded: Sequence[Encoded], shape: BatchShape) -> None:
        if len(encoded) > shape.rows:
            raise UserError(f"{len(encoded)} documents do not fit batch.rows = {shape.rows}; raise it or give fewer")
        if shape.patch_dim != 3 * self.image_rules.patch_size**2:
            raise UserError(
                f"batch.patch_dim is {shape.patch_dim}; patches of side {self.image_rules.patch_size} have "
                f"{3 * self.image_rules.patch_size**2} numbers"
            )
        for row, document in enumerate(encoded):
            if len(document.tokens) > shape.tokens:
                raise UserError(
                    f"document {row} has {len(document.tokens)} tokens and a row holds batch.tokens = {shape.tokens}; "
                    "shorten it or raise batch.tokens"
                )
            if len(document.grids) > shape.images:
                raise UserError(
                    f"document {row} has {len(document.grids)} images and a row holds batch.images = {shape.images}; "
                    "give fewer or raise batch.images"
                )


def _runs(parts: Sequence[Part]) -> Iterator[Image | EndOfUtterance | list[Text]]:
    """Yields images and ends of utterances as they are, and each stretch of neighbouring texts as a list.

    Empty texts vanish, as in a flat string: two images with nothing between them touch.
    """
    texts: list[Text] = []
    for part in parts:
        if isinstance(part, Text):
            if part.text:
                texts.append(part)
            continue
        if not isinstance(part, Image | EndOfUtterance):
            raise UserError(f"a part is {part!r}; it must be Text, Image or EndOfUtterance (see chat.chat_parts)")
        if texts:
            yield texts
            texts = []
        yield part
    if texts:
        yield texts


def first_fit(sizes: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Gives each image the first vision row with room for it, opening rows as needed.

    Args:
      sizes: patches of each image, none above `room`.
      room: patches a vision row holds.

    Returns:
      (vision row, patch it begins at) of each.
    """
    used: list[int] = []
    slots = []
    for size in sizes:
        row = next((row for row, filled in enumerate(used) if filled + size <= room), len(used))
        if row == len(used):
            used.append(0)
        slots.append((row, used[row]))
        used[row] += size
    return slots


def _vision_slots(document: Encoded, shape: BatchShape) -> list[tuple[int, int]]:
    """Places a document's images in the vision rows of its row."""
    sizes = [rows * columns for rows, columns in document.grids]
    for number, (rows, columns) in enumerate(document.grids):
        if rows * columns > shape.patches:
            raise RejectedImage(
                "too-many-patches",
                f"image {number} has {rows} x {columns} = {rows * columns} patches and a vision row holds "
                f"batch.patches = {shape.patches}; lower images.longest_edge or raise batch.patches",
            )
    slots = first_fit(sizes, shape.patches)
    for number, (row, _) in enumerate(slots):
        if row >= shape.vision_rows:
            raise UserError(
                f"image {number} with {sizes[number]} patches finds no room in batch.vision_rows = "
                f"{shape.vision_rows} rows of {shape.patches}; give fewer images or raise batch.vision_rows"
            )
    return slots
