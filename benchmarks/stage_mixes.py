"""Sizes of documents as the paper's stages see them: each stage's own mixture, image rules, chance and cuts.

Sizes are drawn from the mixes of benchmarks/mixes.py: web pages for OBELICS, COCO-like pairs, scanned pages for OCR.
A conversation about an image has the size of a pair's image and the turns and answers that are Table 14's means over
all its sets; one of text alone has the mean tokens of the nine text sets. Documents that no row holds are cut as
data_pipelines.cutting cuts them: web pages between parts, scanned text between lines with its image repeated.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.mixes import MIXES, Grids, grids_of
from configs.idefics2_8b import instruct, stage1, stage2
from data_pipelines.packing import Sizes, misfit
from idefics_jax.batch import BatchShape
from idefics_jax.images import ImageRules

# A document: its tokens, and the grid of patches of each of its images.
Measured = tuple[int, Grids]

CONFIGS = {"stage1": stage1, "stage2": stage2, "instruct": instruct}
PARAGRAPH = 60  # tokens of text between two places where a page may be cut
# Of Table 14: answer tokens of the sets with images over their questions, as often as they are seen; tokens a text
# conversation. A question is taken to be as long as a short one, and User:, Assistant: and the ends of utterances.
ANSWER, QUESTION, TURNS, MOST_TURNS, TEXT_ALONE = 8, 29, 2.6, 7, 108


def stage(name: str) -> tuple[Iterator[Measured], BatchShape, int, int]:
    """Returns a stage's documents without end, one of its rows, and how far and how long its packer looks."""
    config = CONFIGS[name].get_config()
    shape = BatchShape(**{**config.data.shape, "rows": 1})
    return documents(config), shape, config.data.lookahead, config.data.rounds


def documents(config: Any) -> Iterator[Measured]:
    """Yields documents of the first stage of a recipe (what a file in configs/ returns) without end."""
    shape = BatchShape(**{**config.data.shape, "rows": 1})
    first = min(config.data.stages)
    shape = dataclasses.replace(shape, tokens=config.data.document_tokens)
    return _documents(config, config.data.stages[first].sources, shape)


def _documents(config: Any, sources: Any, shape: BatchShape) -> Iterator[Measured]:
    rng = np.random.default_rng(0)
    rules = ImageRules(patch_size=14, max_pixels=64_000_000, **config.image_rules)
    weights = np.array([source.weight for source in sources.values()], float)
    sources = list(sources.values())
    while True:
        source = sources[rng.choice(len(sources), p=weights / weights.sum())]
        text, images = DRAW[source.kind](rng)
        split = dataclasses.replace(rules, split=rng.random() < (source.augmentation.get("split_share") or 0.0))
        grids = [_grids(rng, size, split, source.augmentation) for size in images]
        yield from CUT[source.kind](text, grids, shape)


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


def _page(text: int, images: list[Grids], shape: BatchShape) -> Iterator[Measured]:
    """A web page: paragraphs with its images spread among them, cut where a row is full."""
    paragraphs = [PARAGRAPH] * (text // PARAGRAPH) + [text % PARAGRAPH]
    parts: list[Any] = list(paragraphs)
    for i, image in enumerate(images):
        parts.insert(round(i * len(paragraphs) / len(images)) + i, image)
    piece: list[Any] = []
    for part in parts:
        if piece and misfit(_sizes([*piece, part]), shape):
            yield _measured(piece)
            piece = []
        piece.append(part)
    yield _measured(piece)


def _measured(parts: list[Any]) -> Measured:
    images = [part for part in parts if isinstance(part, list)]
    return _tokens(sum(part for part in parts if isinstance(part, int)), images), [g for own in images for g in own]


def _sizes(parts: list[Any]) -> Sizes:
    tokens, grids = _measured(parts)
    return Sizes(tokens, tuple(rows * columns for rows, columns in grids))


def _scan(text: int, images: list[Grids], shape: BatchShape) -> Iterator[Measured]:
    """A scanned page: as many pieces as its text needs, each with the image."""
    room = shape.tokens - _tokens(0, images)
    for begin in range(0, text, room):
        yield from _whole(min(room, text - begin), images, shape)


def _conversation(rng: np.random.Generator) -> tuple[int, list[tuple[int, int]]]:
    turns = min(rng.geometric(1 / TURNS), MOST_TURNS)
    _, sizes = MIXES["pairs"].draw(rng)
    return int(turns * (QUESTION + 1 + rng.poisson(ANSWER))), sizes


def _chat(rng: np.random.Generator) -> tuple[int, list[tuple[int, int]]]:
    return QUESTION + round(rng.lognormal(np.log(TEXT_ALONE) - 0.5, 1.0)), []


# By the kind of a source: how its documents are drawn, and how they are cut.
DRAW: dict[str, Callable] = {
    "obelics": MIXES["web"].draw,
    "pairs": MIXES["pairs"].draw,
    "pdf": MIXES["documents"].draw,
    "cauldron": _conversation,
    "text": _chat,
}
CUT: dict[str, Callable] = {"obelics": _page, "pairs": _whole, "pdf": _scan, "cauldron": _whole, "text": _whole}
