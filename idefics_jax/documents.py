"""A document: what every source is read into, before it becomes token ids.

A caption pair, an interleaved web page, a conversation: all are an ordered list of parts. Parts become ids one
by one, with control ids spliced between them (processor.py), so no text can spell a control token.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Text:
    """A run of text; `trained` says whether its tokens count in the loss."""

    text: str
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Image:
    """An image as it was stored: JPEG, PNG, WebP or GIF bytes, decoded only after packing.

    Attributes:
      data: the bytes.
      split: whether it is read as its four quarters and the whole; None leaves it to the processor.
      upscale: factor by which it is enlarged before the processor's rules see it.
    """

    data: bytes
    split: bool | None = None
    upscale: float = 1.0


@dataclasses.dataclass(frozen=True)
class EndOfUtterance:
    """The `<end_of_utterance>` control token that closes a turn; `trained` as for Text."""

    trained: bool = True


Part = Text | Image | EndOfUtterance


@dataclasses.dataclass(frozen=True)
class Document:
    """Parts in reading order, and where they came from.

    Attributes:
      parts: in reading order.
      source: names the data set.
      id: the row in it.
      ends: whether it ends where its parts do; if not, no `</s>` follows.
    """

    parts: tuple[Part, ...]
    source: str
    id: str
    ends: bool = True
