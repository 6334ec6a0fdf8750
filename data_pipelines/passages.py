"""Passages: a text in short stretches, between which it may be cut when no row holds it whole."""

import re
import unicodedata

# Some 50 tokens of English.
_LONGEST = 200
# The end of the text; else up to the last line feed, end of a sentence or white space, the first of these that there
# is within reach. Chinese and Japanese end a sentence without white space, maybe with a closing bracket.
_PASSAGE = re.compile(
    rf".{{1,{_LONGEST}}}\Z|.{{0,{_LONGEST - 1}}}\n|.{{0,{_LONGEST - 2}}}(?:[.!?]\s|[。！？][」』）”]?)|"
    rf".{{0,{_LONGEST - 1}}}\s",
    re.DOTALL,
)
# Of ASCII alone, a stretch of this length is no text but data, which a row refuses whole.
_DATA = re.compile(rf"[!-~]{{{_LONGEST},}}\s?")
_JOINER = "\u200d"


def passages(text: str) -> list[str]:
    """Returns the passages of a text, which put together are the text; one that is empty has one, itself.

    A passage has at most 200 characters and ends where a line, a sentence or a word does. A stretch that is longer and
    has no such end, as scripts without spaces may have, is cut between two characters, never before a mark of one; of
    ASCII alone it stays whole.
    """
    found, start = [], 0
    while start < len(text):
        match = _PASSAGE.match(text, start) or _DATA.match(text, start)
        end = match.end() if match else _between_characters(text, start)
        found.append(text[start:end])
        start = end
    return found or [text]


def _between_characters(text: str, start: int) -> int:
    """Returns the last place within reach that parts no character from its marks; the last of all if there is none."""
    last = start + _LONGEST
    for end in range(last, start, -1):
        if not unicodedata.category(text[end]).startswith("M") and _JOINER not in text[end - 1 : end + 1]:
            return end
    return last
