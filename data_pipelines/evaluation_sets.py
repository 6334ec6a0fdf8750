"""Evaluation sets as TFDS builders in ArrayRecord form, made from parquet and read back without TensorFlow.

    python -m data_pipelines.evaluation_sets OUT --name digits --input data/digits/heldout.parquet [--split test]

writes OUT/evaluation_set/digits/1.0.0, which `tfds.builder_from_directory` opens and tfds_source.py reads. An example
is a question: `id`, `images` (as they were encoded), `question`, and `answers`, the accepted ones. The parquet is in
The Cauldron's schema, where each turn is a question, or has columns `question`, `answers` or `answer`, and `images` or
`image`; `id` or `question_id` may be there.

Images are declared as text, which to TFDS is any bytes: declared as images, each would be decoded when it is read.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import tensorflow_datasets as tfds
from absl import logging

from data_pipelines import parquet
from data_pipelines.cauldron import stored_image
from data_pipelines.rejection import BadRow
from idefics_jax.errors import UserError

_COLUMNS = ("id", "question_id", "image", "images", "question", "answer", "answers", "texts")
_BATCH = 16


@dataclasses.dataclass(kw_only=True)
class EvaluationConfig(tfds.core.BuilderConfig):
    """A set: its name, and where its questions are.

    Attributes:
      paths: of parquet files.
      split: what the questions are filed under.
      image_root: where images that hold only a path lie; None if there are none.
    """

    paths: tuple[str, ...] = ()
    split: str = "test"
    image_root: str | None = None


class EvaluationSet(tfds.core.GeneratorBasedBuilder):
    """Questions about images and their accepted answers, in the order of the parquet files."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = tfds.features.FeaturesDict(
            {
                "id": text(),
                "images": tfds.features.Sequence(text()),
                "question": text(),
                "answers": tfds.features.Sequence(text()),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {self.builder_config.split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(questions(self.builder_config.paths, self.builder_config.image_root))


def questions(paths: tuple[str, ...], image_root: str | None) -> Iterator[dict[str, Any]]:
    """Yields the examples of parquet files, in order.

    Raises:
      UserError: a file cannot be read, or a row holds no question.
    """
    for path in paths:
        with parquet.open_file(path) as file:
            columns = [column for column in _COLUMNS if column in file.schema_arrow.names]
            row = 0
            for batch in file.iter_batches(_BATCH, columns=columns):
                for values in _rows(batch, path):
                    try:
                        yield from _examples(values, f"{Path(path).name}:{row}", image_root)
                    except BadRow as error:
                        raise UserError(f"row {row} of {path}: {error}; mend it or drop the row") from error
                    row += 1


def _rows(batch: pa.RecordBatch, path: str) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} holds a text that is not UTF-8 ({error}); write it again") from error


def _examples(row: dict[str, Any], name: str, image_root: str | None) -> Iterator[dict[str, Any]]:
    held = row["images"] if row.get("images") is not None else [row["image"]] if row.get("image") is not None else []
    images = [stored_image(image, image_root).data for image in held]
    if row.get("texts"):
        asked = [(turn["user"], [turn["assistant"]]) for turn in row["texts"]]
    else:
        asked = [(row.get("question"), row["answers"] if row.get("answers") is not None else [row.get("answer")])]
    given = row.get("id") if row.get("id") is not None else row.get("question_id")
    for turn, (question, answers) in enumerate(asked):
        if not question or not answers or not all(answers):
            raise BadRow("null-text", "a question or an answer is missing")
        own = str(name if given is None else given)
        yield {
            "id": own if len(asked) == 1 else f"{own}#{turn}",
            "images": images,
            "question": question,
            "answers": list(answers),
        }


def build(out: Path, config: EvaluationConfig) -> Path:
    """Writes a set and returns its folder.

    Raises:
      UserError: the parquet holds something else than questions, or there is a set of this name.
    """
    builder = EvaluationSet(config=config, data_dir=str(out), file_format="array_record")
    if Path(builder.data_dir).exists():
        raise UserError(f"{builder.data_dir} is there already; delete it, or give the set another name")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Path(builder.data_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of TFDS sets")
    parser.add_argument("--name", required=True, help="of the set")
    parser.add_argument("--input", required=True, action="extend", nargs="+", help="parquet files, as paths or globs")
    parser.add_argument("--split", default="test", help="what the questions are filed under")
    parser.add_argument("--image_root", help="where images that hold only a path lie")
    arguments = parser.parse_args()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        paths = tuple(parquet.expand(arguments.input, where="--input"))
        config = EvaluationConfig(
            name=arguments.name, paths=paths, split=arguments.split, image_root=arguments.image_root
        )
        folder = build(arguments.out, config)
    except UserError as error:
        parser.error(str(error))
    print(folder)


if __name__ == "__main__":
    main()
