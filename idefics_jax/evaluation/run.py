"""One evaluation: ask every question of a source, score the answers, and leave figures, samples and a picture."""

import dataclasses
import json
import random
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath

from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from idefics_jax import processes
from idefics_jax.buckets import write_whole
from idefics_jax.errors import UserError
from idefics_jax.evaluation.contact_sheet import draw_contact_sheet
from idefics_jax.evaluation.metrics import METRICS
from idefics_jax.evaluation.questions import Question, question
from idefics_jax.images import ImageRules, RejectedImage, first_rejected
from idefics_jax.inference.answer import answers, default_decoding
from idefics_jax.model import Model

# Questions on the contact sheet.
SHEET = 30


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """An evaluation.

    Attributes:
      source: where the questions are.
      metric: name in metrics.METRICS.
      rows: questions answered at once.
      max_new_tokens: most tokens an answer.
      limit: questions asked, or None for all.
      dtype: of the arithmetic.
      seed: of the sampling.
    """

    source: SourceConfig
    metric: str
    rows: int
    max_new_tokens: int
    limit: int | None
    dtype: str
    seed: int

    def __post_init__(self):
        if self.metric not in METRICS:
            raise UserError(f"metric is {self.metric!r}; it must be one of {', '.join(METRICS)}")
        for name in ("rows", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed is {self.seed}; it must lie in [0, 2**31)")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}; it must be float32 or bfloat16")


def evaluate(model: Model, config: EvalConfig, folder: epath.Path) -> dict[str, float]:
    """Evaluates a model and writes `metrics.json`, `samples.jsonl` and `contact_sheet.png` into `folder`.

    Each of several processes answers its share of the questions, and the first writes.

    Args:
      model: from `idefics_jax.load`, with a processor; on devices of this process alone.
      config: what to ask.
      folder: created if missing.

    Returns:
      {metric: mean score, "questions": how many}.
    """
    if model.processor is None:
        raise UserError("the checkpoint holds no processor (tokenizer.model); evaluation needs one")
    questions = [question(document) for document in read_documents(config.source)][: config.limit]
    given = _answers_of_all(dataclasses.replace(model, dtype=jnp.dtype(config.dtype)), questions, config)
    scores = [METRICS[config.metric](a, q.answer) for a, q in zip(given, questions, strict=True)]
    figures = {config.metric: sum(scores) / len(scores), "questions": len(scores)}
    if processes.first():
        _write(folder, model.processor.image_rules, config.seed, questions, given, scores, figures)
    return figures


def _answers_of_all(model: Model, questions: Sequence[Question], config: EvalConfig) -> list[str]:
    """Answers this process's share of the questions, every count-th of them; returns the answers of all processes."""
    first, count = jax.process_index(), jax.process_count()
    told = processes.from_all(processes.by_all(lambda: _answers(model, questions[first::count], config)))
    return [told[place % count][place // count] for place in range(len(questions))]


def _answers(model: Model, questions: Sequence[Question], config: EvalConfig) -> list[str]:
    """Answers questions, and tells how far it is."""
    decoding = default_decoding(model.processor, max_new_tokens=config.max_new_tokens)
    prompts = [item.prompt for item in questions]
    given, started = [], time.monotonic()
    try:
        for answer in answers(model, prompts, decoding, rows=config.rows, seed=config.seed):
            given.append(answer)
            if len(given) % config.rows == 0 or len(given) == len(questions):
                rate = len(given) / (time.monotonic() - started)
                shared = f", as each of {jax.process_count()} processes" if processes.several() else ""
                print(f"answered {len(given)}/{len(questions)}  {rate:.1f} questions/s{shared}", flush=True)
    except RejectedImage as error:
        raise UserError(_whose(questions, model.processor.image_rules) or str(error)) from error
    return given


def _write(
    folder: epath.Path,
    rules: ImageRules,
    seed: int,
    questions: Sequence[Question],
    given: Sequence[str],
    scores: Sequence[float],
    figures: dict[str, float],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        {"id": q.id, "question": q.text, "answer": a, "reference": q.answer, "score": s}
        for q, a, s in zip(questions, given, scores, strict=True)
    ]
    write_whole(folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples).encode())
    # A random sample: kinds of question may follow one another in any rhythm.
    shown = sorted(random.Random(seed).sample(range(len(questions)), min(len(questions), SHEET)))
    sheet = [(questions[index], given[index], scores[index]) for index in shown]
    draw_contact_sheet(folder / "contact_sheet.png", rules, *zip(*sheet, strict=True))
    # Last: who finds the figures finds the rest.
    write_whole(folder / "metrics.json", (json.dumps(figures, indent=1) + "\n").encode())


def _whose(questions: Sequence[Question], rules: ImageRules) -> str | None:
    """Returns which question has an image that cannot be used, and why."""
    rejected = ((item.id, first_rejected(item.images, rules)) for item in questions)
    return next((f"question {name}: {found[1]}" for name, found in rejected if found), None)
