"""Passages: a text in short stretches, between which it may be cut when no row holds it whole."""

import re

# Some 50 tokens of English.
_LONGEST = 200
# The end of the text; else up to the last line feed, end of a sentence or white space, the first of these that there
# is within reach; else a longer word, whole.
_PASSAGE = re.compile(
    rf".{{1,{_LONGEST}}}\Z|.{{0,{_LONGEST - 1}}}\n|.{{0,{_LONGEST - 2}}}[.!?]\s|.{{0,{_LONGEST - 1}}}\s|\S+\s?",
    re.DOTALL,
)


def passages(text: str) -> list[str]:
    """Returns the passages of a text, which put together are the text; one that is empty has one, itself.

    A passage has at most 200 characters and ends where a line, a sentence or a word does. A word that is longer stays
    whole.
    """
    return _PASSAGE.findall(text) or [text]
