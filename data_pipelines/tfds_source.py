"""Any TFDS data set in ArrayRecord form as rows of a kind, by random access and without TensorFlow.

A set is named by its shards, `FOLDER/NAME-SPLIT.array_record-00000-of-00008`, so a glob chooses the split; the set's
dataset_info.json and features.json lie beside them. Which feature fills which field of a row is a table, `features` in
a source's config. The fields of a kind, and the features that fill them unless the table says otherwise:

    pairs      image, caption, and whatever other texts the table names
    cauldron   images, user = question, assistant = answers (as evaluation_sets.py writes them)
    text       user = question, assistant = answer
    pdf        images, texts

A feature is bytes or text, a class label (read as its name), or a sequence of them; a feature in a group, or in a
sequence of groups, is called GROUP/FEATURE. Of several texts for one the first is taken, and so it is of several
answers to one question; else questions and answers are turns.

Images are taken as they were encoded. TFDS would decode them, and cannot leave those in a sequence alone, so it is
asked for records as bytes, which are parsed here.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.rejection import BadRow, Rejected
from idefics_jax.errors import UserError

# Kind -> field of its rows -> the feature that fills it.
FIELDS: dict[str, dict[str, str]] = {
    "pairs": {"image": "image", "caption": "caption"},
    "cauldron": {"images": "images", "user": "question", "assistant": "answers"},
    "text": {"user": "question", "assistant": "answer"},
    "pdf": {"images": "images", "texts": "texts"},
}
# Rows of a shard that shuffling moves together, as it moves a row group of parquet.
GROUP_ROWS = 256
# At the end of a shard: of its index, the places of thousands of records.
_INDEX_BYTES = 65536
_SHARD = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.array_record-(?P<shard>\d{5,})-of-\d{5,}")


def is_shard(path: str) -> bool:
    """Whether a file is named as TFDS names the shards of a set in ArrayRecord form."""
    return _SHARD.fullmatch(Path(path).name) is not None


class TfdsRows:
    """The rows of a set of TFDS shards, in their order, as rows of a kind. Threads may share it.

    Attributes:
      group_rows: int64 [groups], the number of rows of each group: up to GROUP_ROWS neighbours of one shard.
      fields: what is in a row by the table.
      files: how many shards there are.
      faults, lost: none; a shard that cannot be read shows when its records are.
    """

    faults = ()
    lost = 0.0

    def __init__(self, paths: Iterable[str], kind: str, features: Mapping[str, str]):
        """Reads what lies beside the shards, and no shard yet.

        Args:
          paths: of shards.
          kind: a name in FIELDS.
          features: field of a row -> feature, where that is not as in FIELDS.

        Raises:
          UserError: a set cannot be opened, or has not these features.
        """
        table = _table(kind, features)
        self.fields = tuple(table)
        self._splits: dict[tuple[str, str], _Split] = {}
        groups = []
        for path in paths:
            folder, (_, split, shard) = os.path.dirname(path) or ".", _SHARD.fullmatch(Path(path).name).groups()
            if (folder, split) not in self._splits:
                self._splits[folder, split] = _Split(folder, split, kind, table)
            opened = self._splits[folder, split]
            first, end = opened.rows_of(int(shard), path)
            starts = range(first, end, GROUP_ROWS)
            groups += [(opened, path, first, start, min(start + GROUP_ROWS, end)) for start in starts]
        self._groups = groups
        self.files = len({path for _, path, *_ in groups})
        self._folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for _, path, *_ in groups])
        self.group_rows = np.array([end - start for *_, start, end in groups], np.int64)

    @property
    def digest(self) -> str:
        """Of the shards' names, sizes and last bytes, where ArrayRecord keeps its index."""
        paths = dict.fromkeys(path for _, path, *_ in self._groups)
        told = [(Path(path).name, os.path.getsize(path), _end_of(path)) for path in paths]
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def name(self, group: int, row: int) -> str:
        """Returns "shard:record": the shard from the folder that holds all of them."""
        _, path, first, start, _ = self._groups[group]
        return f"{os.path.relpath(path, self._folder)}:{start - first + row}"

    def row(self, group: int, row: int) -> dict[str, Any]:
        """Returns a row of a group; raises BadRow if its record is damaged or fills no row of the kind."""
        split, _, _, start, _ = self._groups[group]
        return split.row(start + row)


def _end_of(path: str) -> str:
    with open(path, "rb") as file:
        file.seek(-min(_INDEX_BYTES, os.path.getsize(path)), os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def read(path: str, kind: str, features: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """Yields (id, row) of a shard in order, for preparation; the id is "shard:record". Otherwise as TfdsRows."""
    rows = TfdsRows([path], kind, features)
    for group, count in enumerate(rows.group_rows):
        for row in range(count):
            name = rows.name(group, row)
            try:
                yield name, rows.row(group, row)
            except BadRow as error:
                yield name, Rejected(name, error.reason, str(error))


def _table(kind: str, features: Mapping[str, str]) -> dict[str, str]:
    if kind not in FIELDS:
        raise UserError(f"TFDS sets are read as kind {', '.join(FIELDS)}, not {kind!r}; set kind to one of them")
    for field in features:
        if field not in FIELDS[kind] and kind != "pairs":
            raise UserError(f"features names {field!r}; the fields of kind {kind!r} are {', '.join(FIELDS[kind])}")
    return {**FIELDS[kind], **features}


class _Split:
    """A split of a set: its records as rows of a kind."""

    def __init__(self, folder: str, split: str, kind: str, table: Mapping[str, str]):
        import tensorflow_datasets as tfds  # here, because few sources are TFDS and it takes half a second
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            builder = tfds.builder_from_directory(folder)
            lengths = builder.info.splits[split].shard_lengths
            as_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
            self._records = builder.as_data_source(split, deserialize_method=as_bytes)
        except Exception as error:  # TFDS raises whatever the file it misses or misreads leads to
            raise UserError(
                f"{folder} is no TFDS set in ArrayRecord form with a split {split!r} ({error}); name the shards of one "
                "that tfds has prepared with file_format='array_record'"
            ) from error
        self._parse = tf_example_pb2.Example.FromString
        self._make = functools.partial(_ROWS[kind], table)
        self._ends = np.cumsum(lengths)
        found = _flat(builder.info.features)
        for field, feature in table.items():
            if feature not in found:
                there = ", ".join(sorted(found))
                raise UserError(
                    f"{folder} has no feature {feature!r} for {field}; say in features which of {there} it is"
                )
        self._labels: dict[str, Callable[[int], str]] = {
            name: feature.int2str for name, feature in found.items() if isinstance(feature, tfds.features.ClassLabel)
        }

    def rows_of(self, shard: int, path: str) -> tuple[int, int]:
        """Returns the first row of a shard, and the one after its last."""
        if not (shard < len(self._ends) and os.path.isfile(path)):
            raise UserError(f"{path} is not there, or not of the set beside it; name the set's own shards")
        return int(self._ends[shard - 1]) if shard else 0, int(self._ends[shard])

    def row(self, index: int) -> dict[str, Any]:
        try:
            example = self._parse(self._records[index])
        except (RuntimeError, OSError) as error:  # of array_record
            raise BadRow("damaged-record", f"its record cannot be read ({error}); prepare the set again") from None
        except ValueError as error:  # DecodeError of protobuf
            raise BadRow("damaged-record", f"its record is no example ({error}); prepare the set again") from None
        return self._make({name: self._values(name, value) for name, value in example.features.feature.items()})

    def _values(self, name: str, value: Any) -> list[bytes]:
        if value.WhichOneof("kind") == "int64_list":
            return [self._labels.get(name, str)(number).encode() for number in value.int64_list.value]
        return list(value.bytes_list.value)


def _flat(features: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the features by name, those in a group or a sequence of groups as GROUP/FEATURE."""
    found = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)  # of a sequence
        if hasattr(inner, "items"):
            found |= _flat(inner, f"{prefix}{name}/")
        else:
            found[prefix + name] = inner
    return found


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRow("not-utf8", "a text is not UTF-8; write it again") from None


def _images(table: Mapping[str, str], values: Mapping[str, Sequence[bytes]]) -> list[dict[str, Any]]:
    return [{"bytes": value, "path": None} for value in values.get(table["images"], ())]


def _turns(table: Mapping[str, str], values: Mapping[str, Sequence[bytes]]) -> list[tuple[str, str]]:
    asked, answered = (values.get(table[field], ()) for field in ("user", "assistant"))
    if len(asked) == 1:
        answered = answered[:1]
    if len(asked) != len(answered):
        raise BadRow("lengths-differ", f"it has {len(asked)} questions and {len(answered)} answers; give one for each")
    return [(_text(question), _text(answer)) for question, answer in zip(asked, answered, strict=True)]


def _pair(table: Mapping[str, str], values: Mapping[str, Sequence[bytes]]) -> dict[str, Any]:
    row = {field: next(iter(values.get(feature, ())), None) for field, feature in table.items()}
    return {field: value if field == "image" or value is None else _text(value) for field, value in row.items()}


def _conversation(table: Mapping[str, str], values: Mapping[str, Sequence[bytes]]) -> dict[str, Any]:
    turns = [{"user": user, "assistant": answer, "source": None} for user, answer in _turns(table, values)]
    return {"images": _images(table, values), "texts": turns}


def _messages(table: Mapping[str, str], values: Mapping[str, Sequence[bytes]]) -> dict[str, Any]:
    spoken = [text for turn in _turns(table, values) for text in turn]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(spoken)]}


def _pages(table: Mapping[str, str], values: Mapping[str, Sequence[bytes]]) -> dict[str, Any]:
    return {"images": _images(table, values), "texts": [_text(text) for text in values.get(table["texts"], ())]}


_ROWS = {"pairs": _pair, "cauldron": _conversation, "text": _messages, "pdf": _pages}
