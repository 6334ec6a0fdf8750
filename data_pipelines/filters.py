"""Filters of web pages and pairs: each has a name, a threshold, and a reason of its own to be counted by.

A filter whose name begins with `image_` takes an image out of its page and leaves the page (a pair goes with its
image); one that begins with `document_` takes the whole document. Images are judged first, then the page that remains.
What a filter takes is counted as "filter:<its name>", and is no damage: it does not count against max_bad_fraction.

Where a threshold comes from: "OBELICS" is arXiv 2306.16527 and its published code, whose filters the published pages
have passed; "code" is the authors' training code in its later SmolVLM state (packing.py); "paper" is arXiv 2405.02246.
"""

import collections
import dataclasses
import difflib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from data_pipelines.rejection import FILTERED, BadRow
from idefics_jax.errors import UserError
from idefics_jax.image_gate import RejectedImage, open_image

# The column that holds a document's perplexity; the published pages have none.
PERPLEXITY = "perplexity"
# The reason of images that are missing, within document_max_missing_images.
MISSING = f"{FILTERED}image_missing"
# The reason of pages of images alone, none of which is left.
EMPTIED = f"{FILTERED}document_emptied"
# A header is read whatever it claims: the gate that stands before the decoder refuses bombs.
_ANY_SIZE = 2**62


@dataclasses.dataclass(frozen=True)
class Filters:
    """Thresholds; None leaves a filter out.

    Attributes:
      image_min_side: pixels that the shorter side must have (150: OBELICS; code, for pairs).
      image_max_side: pixels that the longer side may have (20,000: OBELICS).
      image_max_aspect: how many times longer the longer side may be (2: OBELICS' code).
      image_max_repeats: how often a page may show the same image (1: ours; OBELICS counts over all pages).
      document_max_missing_images: share of a page's images that may be missing, which leave the page (1: OBELICS).
      document_min_images: images that a page must have (1: OBELICS, code).
      document_max_images: images that it may have (30: OBELICS).
      document_max_consecutive_images: images without text between them (2: code).
      document_max_trailing_images: images that it may end on (1: code).
      document_min_images_before_text: images that some text comes after (1: code drops a page whose only image is
        last, as no token could look at it).
      document_max_perplexity: what the column `perplexity` may hold at most (paper: the 5 % of pages with the highest
        go, by Falcon-1B; data_pipelines.quantile finds the threshold).
    """

    image_min_side: int | None = None
    image_max_side: int | None = None
    image_max_aspect: float | None = None
    image_max_repeats: int | None = None
    document_max_missing_images: float | None = None
    document_min_images: int | None = None
    document_max_images: int | None = None
    document_max_consecutive_images: int | None = None
    document_max_trailing_images: int | None = None
    document_min_images_before_text: int | None = None
    document_max_perplexity: float | None = None

    def __post_init__(self):
        for name in self.named:
            if not getattr(self, name) >= 0:
                raise UserError(f"filters.{name} is {getattr(self, name)!r}; it must be a number and not negative")
        if self.document_max_missing_images is not None and self.document_max_missing_images > 1:
            raise UserError(
                f"filters.document_max_missing_images is {self.document_max_missing_images!r}; it is a share of a "
                "page's images, at most 1"
            )
        if self.image_max_aspect is not None and self.image_max_aspect < 1:
            raise UserError(f"filters.image_max_aspect is {self.image_max_aspect!r}; it must be at least 1")

    @property
    def named(self) -> tuple[str, ...]:
        """The filters that are set."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None)

    @property
    def columns(self) -> pa.Schema:
        """Columns that files must have for them."""
        return pa.schema([] if self.document_max_perplexity is None else [(PERPLEXITY, pa.float64())])


def parse(text: str) -> Filters:
    """Reads filters from "name=threshold,name=threshold", as a command line gives them; raises UserError."""
    kinds = {field.name: int if field.type == int | None else float for field in dataclasses.fields(Filters)}
    values = {}
    for item in filter(None, text.split(",")):
        name, _, threshold = item.partition("=")
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"there is no filter {name!r}; {hint}there are {', '.join(kinds)}")
        if name in values:
            raise UserError(f"filter {name} is given twice; give it one threshold")
        try:
            values[name] = kinds[name](threshold)
        except ValueError as error:
            raise UserError(f"filter {name} has the threshold {threshold!r}; write {name}=NUMBER") from error
    return Filters(**values)


def check_kind(filters: Filters, kind: str, *, where: str) -> None:
    """Raises UserError if a filter that is set does not fit documents of a kind."""
    fitting = {
        "obelics": [field.name for field in dataclasses.fields(Filters)],
        "pairs": [rule.__name__ for rule in _BY_SIZE],
    }.get(kind, [])
    for name in filters.named:
        if name not in fitting:
            have = f"only {', '.join(fitting)}" if fitting else "none"
            raise UserError(f"{where}: filters.{name} is not for kind {kind!r}, which has {have}; take it out")


def apply(filters: Filters, row: dict[str, Any], kind: str) -> tuple[dict[str, Any], collections.Counter[str]]:
    """Filters a row in the training form.

    Args:
      filters: that fit the kind.
      row: of kind `obelics` or `pairs`, with the images' bytes; of another kind it is left alone.
      kind: of the row.

    Returns:
      The row without the images that were taken out, and how many were, by reason.

    Raises:
      BadRow: the whole document is taken out.
    """
    if kind == "pairs":
        reason = _image_fault(filters, row["image"])
        if reason is not None:
            raise BadRow(reason, "its image is too small, too large or too long; drop the row")
    if kind != "obelics" or not filters.named:
        return row, collections.Counter()
    row, taken = _without_images(filters, row)
    if not row["images"]:
        raise BadRow(EMPTIED, "its images are all taken out or missing, and it has no text")
    outline = [image is not None for image in row["images"]]
    for rule in _BY_OUTLINE:
        threshold = getattr(filters, rule.__name__)
        if threshold is not None and not rule(outline, threshold):
            raise _taken(rule.__name__, threshold)
    if filters.document_max_perplexity is not None and not document_max_perplexity(
        row, filters.document_max_perplexity
    ):
        raise _taken("document_max_perplexity", filters.document_max_perplexity)
    return row, taken


def image_min_side(size: tuple[int, int], least: int) -> bool:
    """Whether both sides have so many pixels."""
    return min(size) >= least


def image_max_side(size: tuple[int, int], most: int) -> bool:
    """Whether neither side has more pixels."""
    return max(size) <= most


def image_max_aspect(size: tuple[int, int], most: float) -> bool:
    """Whether the longer side is at most so many times the shorter."""
    return max(size) <= most * min(size)


def document_min_images(outline: Sequence[bool], least: int) -> bool:
    """Whether a page has so many images; its outline says of each position whether it is an image."""
    return sum(outline) >= least


def document_max_images(outline: Sequence[bool], most: int) -> bool:
    """Whether a page has no more images."""
    return sum(outline) <= most


def document_max_consecutive_images(outline: Sequence[bool], most: int) -> bool:
    """Whether no more images follow one another without text between them."""
    return max((len(list(run)) for is_image, run in itertools.groupby(outline) if is_image), default=0) <= most


def document_max_trailing_images(outline: Sequence[bool], most: int) -> bool:
    """Whether a page ends on no more images."""
    return len(list(itertools.takewhile(bool, reversed(outline)))) <= most


def document_min_images_before_text(outline: Sequence[bool], least: int) -> bool:
    """Whether some text comes after so many images."""
    return sum(itertools.dropwhile(bool, reversed(outline))) >= least


def document_max_perplexity(row: dict[str, Any], most: float) -> bool:
    """Whether a page's perplexity is not higher; one without a score is not known to be good. NaN is no score."""
    score = row.get(PERPLEXITY)  # the training form leaves out what is null
    return score is not None and score <= most


_BY_SIZE: tuple[Callable[[tuple[int, int], float], bool], ...] = (image_min_side, image_max_side, image_max_aspect)
_BY_OUTLINE: tuple[Callable[[Sequence[bool], int], bool], ...] = (
    document_min_images,
    document_max_images,
    document_max_consecutive_images,
    document_max_trailing_images,
    document_min_images_before_text,
)


def _without_images(filters: Filters, row: dict[str, Any]) -> tuple[dict[str, Any], collections.Counter[str]]:
    taken: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[bytes] = collections.Counter()
    kept = []
    for image, text in zip(row["images"], row["texts"], strict=True):
        reason = None
        if image is not None:
            seen[image] += 1
            reason = _image_fault(filters, image)
            if filters.image_max_repeats is not None and seen[image] > filters.image_max_repeats:
                reason = f"{FILTERED}image_max_repeats"
        if reason is None:
            kept.append((image, text))
        else:
            taken[reason] += 1
    return {**row, "images": [image for image, _ in kept], "texts": [text for _, text in kept]}, taken


def _image_fault(filters: Filters, image: bytes) -> str | None:
    """Returns the reason to take an image out, from its header alone.

    An image whose header cannot be read stays: the gate refuses it later, by the fault it has.
    """
    thresholds = [(rule, getattr(filters, rule.__name__)) for rule in _BY_SIZE]
    if all(threshold is None for _, threshold in thresholds):
        return None
    try:
        size = open_image(image, max_pixels=_ANY_SIZE).size
    except RejectedImage:
        return None
    faults = (rule.__name__ for rule, threshold in thresholds if threshold is not None and not rule(size, threshold))
    return next((f"{FILTERED}{name}" for name in faults), None)


def _taken(name: str, threshold: float) -> BadRow:
    return BadRow(f"{FILTERED}{name}", f"the filter {name}={threshold:g} took it")
