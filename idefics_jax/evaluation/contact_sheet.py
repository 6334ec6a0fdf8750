"""Questions, answers and their images on one sheet, right ones green and wrong ones red."""

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

from etils import epath  # noqa: E402  (the backend is chosen before anything draws)
from matplotlib import pyplot as plt  # noqa: E402
from PIL import Image  # noqa: E402

from idefics_jax.evaluation.questions import Question  # noqa: E402
from idefics_jax.images import ImageRules, decode  # noqa: E402

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
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(2.3 * COLUMNS, 2.2 * rows), layout="constrained", squeeze=False)
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
    plt.close(figure)
    path.write_bytes(image.getvalue())
