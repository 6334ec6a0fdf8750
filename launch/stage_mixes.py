"""Sizes of documents as the paper's stages see them: each stage's own mixture, image rules, chance and cuts.

Sizes are drawn from the mixes of launch/mixes.py: web pages for OBELICS, COCO-like pairs, scanned pages for OCR.
A conversation about an image has the size of a pair's image and the turns and answers that are Table 14's means over
all its sets; one of text alone has the mean tokens of the nine text sets. Documents that no row holds are cut by the
code that cuts them in training: a web page or a scanned page is a row of its kind, of words that take a token each.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from configs.idefics2_8b import chat, instruct, stage1, stage2
from data_pipelines import cutting, obelics, pages
from data_pipelines.mixture import Mixture
from data_pipelines.packing import Sizes, misfit
from data_pipelines.rejection import Rejected
from idefics_jax.batch import BatchShape
from idefics_jax.images import ImageRules
from launch.mixes import MIXES, Grids, grids_of

# A document: its tokens, and the grid of patches of each of its images.
Measured = tuple[int, Grids]

CONFIGS = {"stage1": stage1, "stage2": stage2, "instruct": instruct, "chat": chat}
WORD = "the "  # a token: as many characters as one of English has on average
PARAGRAPH = 60  # tokens
# Of Table 14: answer tokens of the sets with images over their questions, as often as they are seen; tokens a text
# conversation. A question is taken to be as long as a short one, and User:, Assistant: and the ends of utterances.
ANSWER, QUESTION, TURNS, MOST_TURNS, TEXT_ALONE = 8, 29, 2.6, 7, 108
# Of the chatty sets: a caption of ShareGPT4V has 942 characters on average (its paper), 4.4 a token; LLaVA's 58,000
# conversations are taken to have four turns, of answers of 40 tokens (ours).
CAPTION, DIALOGUE_TURNS, DIALOGUE_ANSWER = 214, 4, 40


def stage(name: str, *, seed: int = 0) -> tuple[Iterator[Measured], BatchShape, int, int]:
    """Returns a stage's documents without end, one of its rows, and how far and how long its packer looks."""
    config = CONFIGS[name].get_config()
    shape = BatchShape(**{**config.data.shape, "rows": 1})
    return documents(config, seed=seed), shape, config.data.lookahead, config.data.rounds


def documents(config: Any, *, seed: int = 0) -> Iterator[Measured]:
    """Yields documents of the first stage of a recipe (what a file in configs/ returns) without end.

    Their sources follow one another as in a shard of training.
    """
    shape = BatchShape(**{**config.data.shape, "rows": 1})
    first = min(config.data.stages)
    shape = dataclasses.replace(shape, tokens=config.data.document_tokens)
    return _documents(config, config.data.stages[first].sources, shape, seed)


def _documents(config: Any, sources: Any, shape: BatchShape, seed: int) -> Iterator[Measured]:
    rng = np.random.default_rng(seed)
    rules = ImageRules(patch_size=14, max_pixels=64_000_000, **config.image_rules)
    weights = {name: source.weight for name, source in sources.items()}
    mixture = Mixture([(weights, None)], start={}, first=(), seed=(seed,))
    for index in itertools.count():
        name, _ = mixture(index)
        source = sources[name]
        text, images = DRAW.get(name, DRAW[source.kind])(rng)
        split = dataclasses.replace(rules, split=rng.random() < (source.augmentation.get("split_share") or 0.0))
        grids = [_grids(rng, size, split, source.augmentation) for size in images]
        most = source.get("document_tokens") or shape.tokens
        yield from CUT[source.kind](text, grids, dataclasses.replace(shape, tokens=min(most, shape.tokens)))


def _grids(rng: np.random.Generator, size: tuple[int, int], rules: ImageRules, chances: Any) -> Grids:
    """Returns the grids of the images that one becomes, enlarged by chance."""
    largest = chances.get("upscale_to", 2.0)
    factor = rng.triangular(1.5, largest, largest) if rng.random() < chances.get("upscale", 0.0) else 1.0
    return grids_of(size, rules, factor)


def _whole(text: int, images: list[Grids], shape: BatchShape) -> Iterator[Measured]:
    del shape
    grids = [grid for own in images for grid in own]
    yield _tokens(text, images), grids


def _tokens(text: int, images: list[Grids]) -> int:
    """An image split into five takes 5 * 65 + 1 tokens, one alone 66."""
    return 2 + text + sum(65 * len(own) + 1 for own in images)


def _page(text: int, images: list[Grids]) -> dict[str, list]:
    """A web page: paragraphs with its images spread among them, in place of whose bytes are their grids."""
    paragraphs = [PARAGRAPH] * (text // PARAGRAPH) + [text % PARAGRAPH] * bool(text % PARAGRAPH)
    before = [round(i * len(paragraphs) / len(images)) for i in range(len(images))]
    shown, texts = [], []
    for i, (first, end) in enumerate(zip([0, *before], [*before, len(paragraphs)], strict=True)):
        if first < end:
            shown.append(None)
            texts.append("\n".join(WORD * paragraph for paragraph in paragraphs[first:end]))
        if i < len(images):
            shown.append(images[i])
            texts.append(None)
    return {"images": shown, "texts": texts}


def _scan(text: int, images: list[Grids]) -> dict[str, list]:
    """A scanned page, in lines of ten words."""
    lines = [WORD * 10] * (text // 10) + [WORD * (text % 10)] * bool(text % 10)
    return {"images": images, "texts": ["\n".join(lines)]}


def _pieces(
    kind: ModuleType, write: Callable[[int, list[Grids]], dict], text: int, images: list[Grids], shape: BatchShape
) -> Iterator[Measured]:
    """Cuts a document as training does, and leaves out what that leaves out; a piece that is too large stays so."""
    whole = write(text, images)

    def make(first: int, end: int) -> Measured | Rejected:
        piece = kind.piece(whole, first, end)
        tokens, grids = _measured(piece)
        fault = misfit(Sizes(tokens, tuple(rows * columns for rows, columns in grids)), shape)
        if fault is None and not any(piece["texts"]):
            fault = "nothing-trained", "it has images alone"
        return (tokens, grids) if fault is None else Rejected("", *fault)

    for piece in cutting.cut(kind.units(whole), make):
        if cutting.is_too_large(piece):
            yield _measured(whole)
        elif not isinstance(piece, Rejected):
            yield piece


def _measured(row: dict[str, list]) -> Measured:
    images = [image for image in row["images"] if image is not None]
    words = sum(len(text.split()) for text in row["texts"] if text is not None)
    return _tokens(words, images), [grid for own in images for grid in own]


def _conversation(rng: np.random.Generator) -> tuple[int, list[tuple[int, int]]]:
    turns = min(rng.geometric(1 / TURNS), MOST_TURNS)
    _, sizes = MIXES["pairs"].draw(rng)
    return int(turns * (QUESTION + 1 + rng.poisson(ANSWER))), sizes


def _dialogue(rng: np.random.Generator) -> tuple[int, list[tuple[int, int]]]:
    turns = min(rng.geometric(1 / DIALOGUE_TURNS), MOST_TURNS)
    _, sizes = MIXES["pairs"].draw(rng)
    return int(turns * QUESTION + rng.lognormal(np.log(DIALOGUE_ANSWER), 0.4, turns).sum()), sizes


def _caption(rng: np.random.Generator) -> tuple[int, list[tuple[int, int]]]:
    _, sizes = MIXES["pairs"].draw(rng)
    return QUESTION + round(rng.normal(CAPTION, CAPTION / 4)), sizes


def _text_alone(rng: np.random.Generator) -> tuple[int, list[tuple[int, int]]]:
    return QUESTION + round(rng.lognormal(np.log(TEXT_ALONE) - 0.5, 1.0)), []


# By the name of a source, or its kind: how its documents are drawn, and by its kind how they are cut.
DRAW: dict[str, Callable] = {
    "llava_conv": _dialogue,
    "sharegpt4v": _caption,
    "obelics": MIXES["web"].draw,
    "pairs": MIXES["pairs"].draw,
    "pdf": MIXES["documents"].draw,
    "cauldron": _conversation,
    "text": _text_alone,
}
CUT: dict[str, Callable] = {
    "obelics": functools.partial(_pieces, obelics, _page),
    "pairs": _whole,
    "pdf": functools.partial(_pieces, pages, _scan),
    "cauldron": _whole,
    "text": _whole,
}
