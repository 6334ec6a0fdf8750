"""Packed rows as people can look at them: as text, and as a picture.

Text that is trained on is green, other text grey; each document is underlined in a colour of its own, and every image,
put together again from its patches, stands where its tokens are. Padding is told at the end of its row.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from idefics_jax.batch import Batch
from idefics_jax.images import position_ids
from idefics_jax.processor import Processor

TRAINED, OTHER, PADDING = (0, 120, 40), (120, 120, 120), (190, 190, 190)
DOCUMENTS = ((31, 119, 180), (255, 127, 14), (148, 103, 189), (140, 86, 75), (227, 119, 194), (23, 190, 207))
WIDTH, MARGIN, LINE, THUMBNAIL = 1200, 12, 20, 72
# A picture taller than this is cut off; the text is whole.
TALLEST = 12_000
_GREEN, _GREY, _PLAIN = "\033[32m", "\033[90m", "\033[0m"


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring tokens of a document of one kind: text, or an image.

    Attributes:
      segment: the document, from 1.
      text: what they spell; control tokens by name.
      trained: whether they are trained on.
      image: uint8 [h, w, 3], or None for text.
    """

    segment: int
    text: str
    trained: bool
    image: np.ndarray | None = None


def runs(batch: Batch, row: int, processor: Processor) -> list[Run]:
    """Returns the runs of a row's documents, in order."""
    tokens, segments = batch["tokens"][row], batch["segment_ids"][row]
    # loss_weights[t] weighs the prediction of tokens[t + 1].
    trained = np.concatenate([[False], batch["loss_weights"][row][:-1] > 0])
    tokenizer, found, start, image = processor.tokenizer, [], 0, 0
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>", tokenizer.end_of_utterance_id: "<end_of_utterance>"}
    length = int((segments > 0).sum())
    while start < length:
        token = int(tokens[start])
        if token == tokenizer.image_token_id:
            found.append(Run(int(segments[start]), "<image>", False, image_of(batch, row, image, processor)))
            start, image = start + processor.num_latents, image + 1
        elif token == tokenizer.fake_token_id:
            start += 1
        elif token in names:
            found.append(Run(int(segments[start]), names[token], bool(trained[start])))
            start += 1
        else:
            special = [*names, tokenizer.image_token_id, tokenizer.fake_token_id]
            end = start + 1
            while end < length and (segments[end], trained[end]) == (segments[start], trained[start]):
                if int(tokens[end]) in special:
                    break
                end += 1
            text = spelling(tokens[start:end], processor)
            found.append(Run(int(segments[start]), text, bool(trained[start])))
            start = end
    return found


def spelling(tokens: np.ndarray, processor: Processor) -> str:
    """Returns the text of tokens to the letter; decoding would drop a space that opens it."""
    pieces = [processor.tokenizer.piece(int(token)) for token in tokens]
    spelt = (bytes([int(p[3:5], 16)]) if p.startswith("<0x") and len(p) == 6 else p.encode() for p in pieces)
    return b"".join(spelt).decode(errors="replace").replace("\u2581", " ")


def image_of(batch: Batch, row: int, image: int, processor: Processor) -> np.ndarray:
    """Puts an image of a row together from its patches: uint8 [h, w, 3]."""
    here = batch["patch_image_ids"][row] == image + 1
    patches, positions = batch["patches"][row][here], batch["patch_positions"][row][here]
    size, side = processor.image_rules.patch_size, processor.image_rules.positions_per_side
    # Neighbours may share a position, so the sides are those that give these positions.
    count = len(positions)
    rows = next(
        rows
        for rows in range(1, count + 1)
        if count % rows == 0 and np.array_equal(position_ids(rows, count // rows, side), positions)
    )
    grid = patches.reshape(rows, -1, size, size, 3)
    return grid.swapaxes(1, 2).reshape(rows * size, -1, 3)


def figures(batch: Batch, row: int) -> str:
    """Returns a line about a row: how full it is, and how much of it is trained on."""
    segments, patches = batch["segment_ids"][row], batch["patch_image_ids"][row]
    real, trained = int((segments > 0).sum()), int((batch["loss_weights"][row] > 0).sum())
    return (
        f"row {row}: {segments.max()} documents, {batch['image_mask'][row].sum()} images, {real} of {len(segments)} "
        f"tokens and {int((patches > 0).sum())} of {patches.size} patches used, {trained} tokens trained on"
    )


def as_text(batch: Batch, row: int, processor: Processor, *, colour: bool) -> str:
    """Returns a row as text, a document a line; with `colour` for a terminal, else trained text in [brackets]."""
    lines: dict[int, str] = {}
    for run in runs(batch, row, processor):
        if run.image is not None:
            shown = f"<image {run.image.shape[1]}x{run.image.shape[0]}>"
        elif colour:
            shown = f"{_GREEN if run.trained else _GREY}{run.text}{_PLAIN}"
        else:
            shown = f"[{run.text}]" if run.trained else run.text
        lines[run.segment] = lines.get(run.segment, "") + shown.replace("\n", "\u21b5")
    return "\n".join([figures(batch, row), *(f"  {segment}. {line}" for segment, line in lines.items())])


class _Sheet:
    """A picture that is written like a page, line by line."""

    def __init__(self):
        self.image = Image.new("RGB", (WIDTH, 400), "white")
        fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
        self.plain = ImageFont.truetype(fonts / "DejaVuSans.ttf", 13)
        self.bold = ImageFont.truetype(fonts / "DejaVuSans-Bold.ttf", 13)
        self.x, self.y, self.height = MARGIN, MARGIN, LINE

    def new_line(self, gap: int = 0) -> None:
        self.x, self.y, self.height = MARGIN, self.y + self.height + gap, LINE

    def _room(self, width: int, height: int) -> None:
        if self.x + width > WIDTH - MARGIN and self.x > MARGIN:
            self.new_line(4)
        self.height = max(self.height, height)
        needed = self.y + self.height + MARGIN
        if needed > self.image.height:
            taller = Image.new("RGB", (WIDTH, 2 * needed), "white")
            taller.paste(self.image)
            self.image = taller

    def write(self, text: str, colour: tuple, underline: tuple | None, *, bold: bool = False) -> None:
        font = self.bold if bold else self.plain
        for word in text.replace("\n", "\u21b5").replace(" ", " \0").split("\0"):
            width = int(font.getlength(word)) + 1
            self._room(width, LINE)
            draw = ImageDraw.Draw(self.image)
            draw.text((self.x, self.y), word, fill=colour, font=font)
            if underline:
                draw.line((self.x, self.y + LINE - 3, self.x + width, self.y + LINE - 3), fill=underline, width=2)
            self.x += width

    def put(self, pixels: np.ndarray, frame: tuple) -> None:
        image = Image.fromarray(pixels)
        image.thumbnail((4 * THUMBNAIL, THUMBNAIL))
        self._room(image.width + 6, image.height + 6)
        self.image.paste(image, (self.x + 3, self.y + 2))
        box = (self.x + 1, self.y, self.x + image.width + 4, self.y + image.height + 3)
        ImageDraw.Draw(self.image).rectangle(box, outline=frame, width=2)
        self.x += image.width + 6


def draw(batches: Sequence[Batch], processor: Processor, path: Path) -> None:
    """Draws the rows of some batches into one PNG."""
    sheet = _Sheet()
    for batch in batches:
        for row in range(len(batch["tokens"])):
            if sheet.y > TALLEST:
                break
            sheet.write(figures(batch, row), (0, 0, 0), None, bold=True)
            sheet.new_line(4)
            for run in runs(batch, row, processor):
                colour = DOCUMENTS[(run.segment - 1) % len(DOCUMENTS)]
                if run.image is not None:
                    sheet.put(run.image, colour)
                else:
                    sheet.write(run.text, TRAINED if run.trained else OTHER, colour)
            unused = int((batch["segment_ids"][row] == 0).sum())
            if unused:
                sheet.write(f" + {unused} tokens of padding", PADDING, None)
            sheet.new_line(14)
    sheet.image.crop((0, 0, WIDTH, min(sheet.y + MARGIN, sheet.image.height))).save(path)
