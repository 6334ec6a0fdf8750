"""Questions, answers and their images on one sheet, right ones green and wrong ones red."""

import io
from collections.abc import Sequence

from etils import epath
from matplotlib.figure import Figure
from PIL import Image

from idefics_jax.buckets import write_whole
from idefics_jax.evaluation.questions import Question
from idefics_jax.images import ImageRules, decode

COLUMNS = 6


def _side_by_side(images: Sequence[bytes], rules: ImageRules) -> Image.Image:
    """Returns the images as the model's rules decode them, in a row on white, with a gap between them."""
    opened = [decode(data, rules) for data in images]
    sheet = Image.new("RGB", (sum(i.width + 4 for i in opened), max(i.height for i in opened)), "white")
    left = 0
    for image in opened:
        sheet.paste(image, (left, 0))
        left += image.width + 4
    return sheet


def draw_contact_sheet(
    path: epath.Path, rules: ImageRules, questions: Sequence[Question], answers: Sequence[str], scores: Sequence[float]
) -> None:
    """Draws the sheet as a PNG: image, question, answer, and the reference where the answer is wrong."""
    rows = -(-len(questions) // COLUMNS)
    figure = Figure(figsize=(2.3 * COLUMNS, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, question, answer, score in zip(axes.flat, questions, answers, scores, strict=False):
        if question.images:
            axis.imshow(_side_by_side(question.images, rules), cmap="gray")
        wrong = "" if score == 1 else f"\n(it is {question.answer})"
        colour = "darkgreen" if score == 1 else "firebrick"
        asked = question.text.removeprefix("User:").removesuffix("Assistant:").strip()
        axis.set_title(f"{asked}\n{answer}{wrong}", fontsize=7, color=colour, parse_math=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png")
    write_whole(path, image.getvalue())
