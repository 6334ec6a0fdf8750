"""TFDS sets in ArrayRecord form are read at random as rows of a kind, without TensorFlow."""

import dataclasses
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines import prepare, tfds_source
from data_pipelines.pipeline import Stage, batches
from data_pipelines.rejection import BadRow, Rejected
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from idefics_jax.documents import Image, Text
from idefics_jax.errors import UserError
from tests.data_pipelines.pictures import png

TEXT = tfds.features.Text()
ENDS_IN_NULS = png(28, 28) + b"\0\0"
TRAIN = "zoo-train.array_record-00000-of-00001"
TEST = "zoo-test.array_record-00000-of-00001"


class Zoo(tfds.core.GeneratorBasedBuilder):
    """A set with every form of feature that is read."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "photo": tfds.features.Image(),
            "views": tfds.features.Sequence(tfds.features.Image()),
            "raw": tfds.features.Sequence(TEXT),
            "animal": tfds.features.ClassLabel(names=["cat", "dog"]),
            "captions": tfds.features.Sequence(TEXT),
            "turns": tfds.features.Sequence({"asked": TEXT, "answered": TEXT}),
            "meta": {"note": TEXT},
            "numbers": tfds.features.Sequence({"asked": TEXT, "answered": np.float32}),
            "is_right": np.bool_,
            "pixels": tfds.features.Tensor(shape=(2, 2, 3), dtype=np.uint8),
            "steps": tfds.features.Dataset({"said": TEXT}),
        }
        info = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=info, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(600), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield (
                i,
                {
                    "photo": io.BytesIO(png(28 + i % 5, 28)),
                    "views": [io.BytesIO(png(9, 9)) for _ in range(i % 3)],
                    "raw": [ENDS_IN_NULS, b"\xff"],
                    "animal": i % 2,
                    "captions": [f"é {i}", "second"],
                    "turns": [{"asked": f"q{turn}", "answered": f"a{turn}"} for turn in range(i % 3)],
                    "meta": {"note": f"n{i}"},
                    "numbers": [{"asked": "pi?", "answered": 3.1}, {"asked": "4?", "answered": 4.0}],
                    "is_right": i % 2 == 0,
                    "pixels": np.zeros((2, 2, 3), np.uint8),
                    "steps": [{"said": "a"}],
                },
            )


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Path:
    builder = Zoo(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def source(zoo, kind, split="test", **features):
    return SourceConfig("zoo", kind, (f"{zoo}/*-{split}.array_record-*",), features=tuple(features.items()))


def rows(zoo, kind, shard=TEST, **features):
    return tfds_source.TfdsRows([str(zoo / shard)], kind, features)


def test_pairs_are_an_image_and_a_label_or_the_first_of_several_texts(zoo):
    documents = list(read_documents(source(zoo, "pairs", image="photo", caption="animal")))
    assert [document.parts for document in documents] == [
        (Image(png(28 + i, 28)), Text(("cat", "dog", "cat")[i])) for i in range(3)
    ]
    assert [document.id for document in documents] == [f"{TEST}:{i}" for i in range(3)]
    captioned = read_documents(source(zoo, "pairs", image="photo", caption="captions"))
    assert [document.parts[1].text for document in captioned] == ["é 0", "é 1", "é 2"]


def test_a_pair_may_have_several_captions(zoo):
    config = source(zoo, "pairs", image="photo", caption="captions", note="meta/note")
    config = dataclasses.replace(config, captions=(("note", 1.0), ("caption", 1.0)))
    assert [document.parts[1].text for document in read_documents(config)] == ["n0", "n1", "n2"]
    with pytest.raises(UserError, match="has no column other string, which its captions need"):
        list(read_documents(dataclasses.replace(config, captions=(("other", 1.0),))))


def test_questions_and_answers_in_a_sequence_are_turns(zoo):
    turns = {"user": "turns/asked", "assistant": "turns/answered"}
    found = rows(zoo, "cauldron", TRAIN, images="views", **turns)
    assert list(found.group_rows) == [256, 256, 88]
    assert found.name(2, 87) == f"{TRAIN}:599"
    row = found.row(2, 87)
    assert row["texts"] == [{"user": f"q{i}", "assistant": f"a{i}", "source": None} for i in range(2)]
    assert row["images"] == [{"bytes": png(9, 9), "path": None}] * 2
    messages = rows(zoo, "text", **turns).row(0, 2)["messages"]
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q1"),
        ("assistant", "a1"),
    ]


def test_one_question_takes_the_first_of_its_answers(zoo):
    row = rows(zoo, "cauldron", images="views", user="meta/note", assistant="captions").row(0, 1)
    assert row["texts"] == [{"user": "n1", "assistant": "é 1", "source": None}]


RAGGED = tfds.features.FeaturesDict(
    {
        "qa": tfds.features.Sequence({"question": TEXT, "answers": tfds.features.Sequence(TEXT)}),
        "views": tfds.features.Sequence(tfds.features.Sequence(tfds.features.Image(), length=2)),
        "deep": tfds.features.Sequence(tfds.features.Sequence(tfds.features.Sequence(TEXT))),
    }
)
VIEWS = [png(9, 9), png(14, 9), png(19, 9), png(24, 9)]


@pytest.fixture
def ragged(zoo, tmp_path) -> Path:
    """A set with sequences of sequences, which TFDS writes with TensorFlow alone: written here as its format says."""
    folder = tmp_path / "1.0.0"
    shutil.copytree(zoo, folder)
    RAGGED.save_config(folder)
    writer = array_record_module.ArrayRecordWriter(str(folder / TEST), "group_size:1")
    for answers in (["00", "10", "11", "20"], ["00"], ["00"]):
        example = tf_example_pb2.Example()
        stored = example.features.feature
        asked = [b"q0", b"q1", b"q2"] if len(answers) > 1 else [b"q0", b"unanswered"]
        stored["qa/question"].bytes_list.value.extend(asked)
        stored["qa/answers/ragged_flat_values"].bytes_list.value.extend(answer.encode() for answer in answers)
        stored["qa/answers/ragged_row_lengths_0"].int64_list.value.extend([1, 2, 1] if len(answers) > 1 else [1, 0])
        stored["views/ragged_flat_values"].bytes_list.value.extend(VIEWS)
        stored["views/ragged_row_lengths_0"].int64_list.value.extend([2, 2])
        stored["deep/ragged_flat_values"].bytes_list.value.extend([b"a"])
        for level in range(2):
            stored[f"deep/ragged_row_lengths_{level}"].int64_list.value.extend([1])
        writer.write(example.SerializeToString())
    writer.close()
    return folder


def test_of_a_sequence_of_answers_to_each_of_several_questions_the_first_is_taken(ragged):
    found = rows(ragged, "cauldron", images="views", user="qa/question", assistant="qa/answers")
    row = found.row(0, 0)
    assert [(turn["user"], turn["assistant"]) for turn in row["texts"]] == [("q0", "00"), ("q1", "10"), ("q2", "20")]
    assert [image["bytes"] for image in row["images"]] == VIEWS
    with pytest.raises(BadRow, match="one of its questions has no answer"):
        found.row(0, 1)
    with pytest.raises(UserError, match="'deep' is a sequence of sequences of sequences"):
        rows(ragged, "pdf", images="views", texts="deep")


def test_tfds_itself_reads_sequences_of_sequences_alike(ragged):
    as_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
    stored = tfds.builder_from_directory(ragged).as_data_source("test", deserialize_method=as_bytes)[0]
    found = RAGGED._example_parser_np.parse_example(stored)
    assert [list(answers) for answers in found["qa"]["answers"]] == [[b"00"], [b"10", b"11"], [b"20"]]
    # Sequences of a fixed length it splits once more than they are, so that `views` has nothing to be compared with.


def test_numbers_are_texts(zoo):
    row = rows(zoo, "text", user="numbers/asked", assistant="numbers/answered").row(0, 0)
    assert [message["content"] for message in row["messages"]] == ["pi?", "3.1", "4?", "4.0"]
    found = rows(zoo, "pairs", image="photo", caption="is_right")
    assert [found.row(0, i)["caption"] for i in range(3)] == ["True", "False", "True"]


def test_bytes_come_back_to_the_last_nul(zoo):
    row = rows(zoo, "pdf", images="raw", texts="captions").row(0, 0)
    assert [image["bytes"] for image in row["images"]] == [ENDS_IN_NULS, b"\xff"]
    assert row["texts"] == ["é 0", "second"]


def test_examples_that_fill_no_row_are_refused_by_reason(zoo):
    with pytest.raises(BadRow, match="not UTF-8"):
        rows(zoo, "pdf", images="views", texts="raw").row(0, 0)
    with pytest.raises(BadRow, match="2 questions and 1 answers"):
        rows(zoo, "cauldron", images="views", user="captions", assistant="meta/note").row(0, 0)


def test_training_reads_a_set_at_random_and_the_same_each_time(zoo, config, processor):
    config = dataclasses.replace(
        config, stages=(Stage((source(zoo, "pairs", "train", image="photo", caption="animal"),)),)
    )
    first, again = (next(batches(config, processor, process_index=0, process_count=1)) for _ in range(2))
    assert len(first.documents) > 4
    assert first.documents == again.documents
    assert not first.rejected


def test_a_damaged_record_is_counted_and_the_others_stay(zoo, tmp_path):
    folder = tmp_path / "1.0.0"
    shutil.copytree(zoo, folder)
    data = bytearray((folder / TEST).read_bytes())
    data[data.index("é 1".encode())] ^= 255
    (folder / TEST).write_bytes(data)
    found = tfds_source.TfdsRows([str(folder / TEST)], "pairs", {"image": "photo", "caption": "animal"})
    with pytest.raises(BadRow) as refused:
        found.row(0, 1)
    assert refused.value.reason == "damaged-record"
    assert found.row(0, 2)["caption"] == "cat"


def test_preparation_makes_the_same_documents_of_a_set_as_training(zoo, tmp_path, monkeypatch, capsys):
    shards, table = str(tmp_path / "shards"), {"image": "photo", "caption": "animal"}
    command = ["prepare", "--kind", "pairs", "--input", f"{zoo}/*-test.array_record-*", "--output", shards]
    monkeypatch.setattr(sys, "argv", [*command, "--processes", "1", "--features", "image=photo,caption=animal"])
    prepare.main()
    assert "3 documents with 3 images" in capsys.readouterr().out
    prepared = read_documents(SourceConfig("zoo", "pairs", (shards,)))
    assert [document.parts for document in prepared] == [
        document.parts for document in read_documents(source(zoo, "pairs", **table))
    ]


def test_preparation_counts_bad_examples(zoo):
    found = list(tfds_source.read(str(zoo / TEST), "pdf", {"images": "views", "texts": "raw"}))
    assert [(name, row.name, row.reason) for name, row in found if isinstance(row, Rejected)] == [
        (f"{TEST}:{i}", f"{TEST}:{i}", "not-utf8") for i in range(3)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "obelics"}, "read as kind pairs, cauldron, text, pdf, not 'obelics'"),
        ({"features": (("picture", "photo"),), "kind": "pdf"}, "features names 'picture'"),
        ({"features": (("image", "picture"),)}, "no feature 'picture' for image; say in features which of animal"),
        (
            {"features": (("image", "pixels"), ("caption", "animal"))},
            "'pixels' is a Tensor, and images are read as enc",
        ),
        ({"features": (("image", "photo"), ("caption", "steps/said"))}, "no feature 'steps/said' for caption"),
        ({"paths": ("{zoo}/zoo-valid.array_record-00000-of-00001",)}, "matches no file"),
        ({"paths": ("{zoo}/other-valid.array_record-00000-of-00001",)}, "no TFDS set .* with a split 'valid'"),
        ({"paths": ("{zoo}/other-test.array_record-00001-of-00002",)}, "not of the set beside it"),
        ({"paths": ("{zoo}/" + TEST, "{zoo}/dataset_info.json")}, "mixes TFDS shards with other files"),
        ({"paths": ("{zoo}/dataset_info.json",)}, "features are for TFDS sets, and its paths name other files"),
    ],
)
def test_what_is_no_source_is_said(zoo, tmp_path, change, message):
    folder = tmp_path / "1.0.0"
    shutil.copytree(zoo, folder)
    for name in ("other-valid.array_record-00000-of-00001", "other-test.array_record-00001-of-00002"):
        (folder / name).write_bytes(b"")
    paths = tuple(path.format(zoo=folder) for path in change.pop("paths", ("{zoo}/" + TEST,)))
    config = source(folder, "pairs", image="photo", caption="animal")
    with pytest.raises(UserError, match=message):
        list(read_documents(dataclasses.replace(config, paths=paths, **change)))


def test_tensorflow_was_never_imported():
    assert "tensorflow" not in sys.modules
