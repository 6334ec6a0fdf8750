"""A question is a document up to its first trained word; the trained words are the answer that is expected."""

import dataclasses
from collections.abc import Sequence

from idefics_jax.documents import Document, Image, Part, Text
from idefics_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, the reference answer, and the row it came from."""

    prompt: tuple[Part, ...]
    answer: str
    id: str

    @property
    def text(self) -> str:
        """The prompt's words in one line, without images and roles' line breaks."""
        return " ".join("".join(part.text for part in self.prompt if isinstance(part, Text)).split())

    @property
    def images(self) -> list[bytes]:
        return [part.data for part in self.prompt if isinstance(part, Image)]


def question(document: Document) -> Question:
    """Cuts a document at its first answer.

    Raises:
      UserError: nothing in the document is trained on, so there is no answer to compare with.
    """
    parts: Sequence[Part] = document.parts
    start = next(
        (i for i, part in enumerate(parts) if isinstance(part, Text) and part.trained and part.text.strip()), None
    )
    if start is None:
        raise UserError(
            f"{document.source} row {document.id} has no answer; evaluation needs question-answer documents"
        )
    # A space that opens the answer belongs to it, not to the prompt.
    prompt = [part for part in parts[:start] if not (isinstance(part, Text) and part.trained)]
    answer = ""
    for part in parts[start:]:
        if not (isinstance(part, Text) and part.trained):
            break
        answer += part.text
    return Question(tuple(prompt), answer.strip(), document.id)
