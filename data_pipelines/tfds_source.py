"""Any TFDS data set in ArrayRecord form as rows of a kind, by random access and without TensorFlow.

A set is named by its shards, `FOLDER/NAME-SPLIT.array_record-00000-of-00008`, so a glob chooses the split; the set's
dataset_info.json and features.json lie beside them. Which feature fills which field of a row is a table, `features` in
a source's config. The fields of a kind, and the features that fill them unless the table says otherwise:

    pairs      image, caption, and whatever other texts the table names
    cauldron   images, user = question, assistant = answers (as evaluation_sets.py writes them)
    text       user = question, assistant = answer
    pdf        images, texts

A feature is bytes or text, a class label (read as its name), a number, or a sequence of them, or of such sequences; a
feature in a group, or in a sequence of groups, is called GROUP/FEATURE. Of several texts for one the first is taken,
and so it is of several answers to one question; else questions and answers are turns.

Images are taken as they were encoded. TFDS would decode them, and cannot leave those in a sequence alone, so it is
asked for records as bytes, which are parsed here.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        for field, name in table.items():
            if name not in found:
                there = ", ".join(sorted(found))
                raise UserError(f"{folder} has no feature {name!r} for {field}; say in features which of {there} it is")
            _check(found[name], field, where=f"{folder}: feature {name!r}")
        self._features = {name: found[name] for name in table.values()}

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
        stored = example.features.feature
        return self._make({name: _values(stored, name, feature) for name, feature in self._features.items()})


@dataclasses.dataclass(frozen=True)
class _Feature:
    """A feature without the sequences around it, and how many there are."""

    of_one: Any
    depth: int


def _flat(features: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, _Feature]:
    """Returns the features by name, those in a group or a sequence of groups as GROUP/FEATURE; no set within the set.

    Args:
      features: a group of features.
      prefix: of their names.
      depth: how many sequences they are in.
    """
    import tensorflow_datasets as tfds

    found = {}
    for name, feature in features.items():
        own = depth
        while isinstance(feature, tfds.features.Sequence) and not isinstance(feature, tfds.features.Dataset):
            own, feature = own + 1, feature.feature
        if isinstance(feature, tfds.features.FeaturesDict):
            found |= _flat(feature, f"{prefix}{name}/", own)
        elif not isinstance(feature, tfds.features.Dataset):
            found[prefix + name] = _Feature(feature, own)
    return found


def _check(feature: _Feature, field: str, *, where: str) -> None:
    """Raises UserError if a feature cannot fill a field."""
    import tensorflow_datasets as tfds

    if feature.depth > 2:
        raise UserError(f"{where} is a sequence of sequences of sequences; write the set with one less")
    is_encoded = isinstance(feature.of_one, tfds.features.Image | tfds.features.Text)
    if field in ("image", "images") and not is_encoded:
        what = type(feature.of_one).__name__
        raise UserError(f"{where} is a {what}, and images are read as encoded files; write the set with Image features")


def _values(stored: Mapping[str, Any], name: str, feature: _Feature) -> list:
    """Returns the bytes of a feature, and a list of them for each sequence in a sequence."""
    if feature.depth < 2:
        return _words(stored[name], feature.of_one)
    words = _words(stored[f"{name}/ragged_flat_values"], feature.of_one)
    lengths = stored[f"{name}/ragged_row_lengths_0"].int64_list.value
    ends = itertools.accumulate(lengths)
    return [words[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _words(value: Any, feature: Any) -> list[bytes]:
    """Returns what is stored as bytes as it is, a label as its name, and other numbers as they are written."""
    kind = value.WhichOneof("kind")
    if kind == "int64_list":
        as_text = getattr(feature, "int2str", str) if feature.np_dtype != np.bool_ else lambda number: str(bool(number))
        return [as_text(number).encode() for number in value.int64_list.value]
    if kind == "float_list":
        return [str(number).encode() for number in np.array(value.float_list.value, np.float32)]
    return list(value.bytes_list.value)


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRow("not-utf8", "a text is not UTF-8; write it again") from None


def _first(value: bytes | Sequence[bytes]) -> bytes:
    """Returns the text that stands for several."""
    if isinstance(value, bytes):
        return value
    if not value:
        raise BadRow("null-text", "one of its questions has no answer; drop the row")
    return value[0]


def _images(table: Mapping[str, str], values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    found = values[table["images"]]
    every = itertools.chain.from_iterable([it] if isinstance(it, bytes) else it for it in found)
    return [{"bytes": value, "path": None} for value in every]


def _turns(table: Mapping[str, str], values: Mapping[str, Sequence[Any]]) -> list[tuple[str, str]]:
    asked, answered = ([_first(value) for value in values[table[field]]] for field in ("user", "assistant"))
    if len(asked) == 1:
        answered = answered[:1]
    if len(asked) != len(answered):
        raise BadRow("lengths-differ", f"it has {len(asked)} questions and {len(answered)} answers; give one for each")
    return [(_text(question), _text(answer)) for question, answer in zip(asked, answered, strict=True)]


def _pair(table: Mapping[str, str], values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    row = {field: _first(values[feature][0]) if values[feature] else None for field, feature in table.items()}
    return {field: value if field == "image" or value is None else _text(value) for field, value in row.items()}


def _conversation(table: Mapping[str, str], values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    turns = [{"user": user, "assistant": answer, "source": None} for user, answer in _turns(table, values)]
    return {"images": _images(table, values), "texts": turns}


def _messages(table: Mapping[str, str], values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    spoken = [text for turn in _turns(table, values) for text in turn]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(spoken)]}


def _pages(table: Mapping[str, str], values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {"images": _images(table, values), "texts": [_text(_first(text)) for text in values[table["texts"]]]}


_ROWS = {"pairs": _pair, "cauldron": _conversation, "text": _messages, "pdf": _pages}
