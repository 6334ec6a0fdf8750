import hashlib
import io
import sys

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import digits
from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from idefics_jax.documents import Image
from idefics_jax.errors import UserError
from tests.data_pipelines.conftest import COUNTS, KINDS

CAULDRON = {
    "images": "list<element: struct<bytes: binary, path: string>>",
    "texts": "list<element: struct<user: string, assistant: string, source: string>>",
}
OBELICS = {
    "images": "list<element: string>",
    "metadata": "string",
    "general_metadata": "string",
    "texts": "list<element: string>",
}


@pytest.mark.parametrize(
    ("name", "published"),
    [("conversations", CAULDRON), ("numbers", CAULDRON), ("heldout", CAULDRON), ("interleaved", OBELICS)],
)
def test_files_have_the_published_columns_and_types(digits_folder, name, published):
    schema = pq.read_schema(digits_folder / f"{name}.parquet")
    assert {field.name: str(field.type) for field in schema} == published


def test_pairs_have_img2dataset_columns(digits_folder):
    schema = pq.read_schema(digits_folder / "pairs.parquet")
    assert schema.field("caption").type == pa.string()
    assert schema.field("key").type == pa.string()
    assert schema.field("url").type == pa.string()
    assert schema.field("png").type == pa.binary()


def test_every_kind_of_document_can_be_read(digits_folder):
    for name, kind in {**KINDS, "warmup": "pairs", "heldout": "cauldron"}.items():
        source = SourceConfig(name, kind, (str(digits_folder / f"{name}.parquet"),), image_root=str(digits_folder))
        assert len(list(read_documents(source))) == COUNTS[name]


def test_no_held_out_scan_is_in_a_training_document(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, "TURN", 0.0)
    monkeypatch.setattr(digits, "SHIFT", 0.0)
    monkeypatch.setattr(digits, "SCALE", 0.0)
    digits.build(tmp_path / "plain", seed=0, counts=COUNTS)
    held_out = shown(tmp_path / "plain", "heldout", "cauldron")
    training = set().union(
        *(shown(tmp_path / "plain", name, kind) for name, kind in {**KINDS, "warmup": "pairs"}.items())
    )
    assert len(held_out) > 50
    assert len(training) > 200
    assert not held_out & training


def shown(folder, name: str, kind: str) -> set[bytes]:
    """The pixels of every digit, found where the grid of patches has ink."""
    source = SourceConfig(name, kind, (str(folder / f"{name}.parquet"),), image_root=str(folder))
    found = set()
    for document in read_documents(source):
        for part in document.parts:
            if isinstance(part, Image):
                pixels = np.asarray(PIL.Image.open(io.BytesIO(part.data)))
                rows = np.flatnonzero(pixels.reshape(-1, 14, pixels.shape[1]).any((1, 2)))
                columns = np.flatnonzero(pixels.T.reshape(-1, 14, pixels.shape[0]).any((1, 2)))
                band = pixels[rows[0] * 14 : (rows[0] + 2) * 14]
                found |= {band[:, c * 14 : (c + 2) * 14].tobytes() for c in range(columns[0], columns[-1], 2)}
    return found


def test_digits_lie_on_the_grid_of_patches(digits_folder):
    for name in ("pairs", "warmup"):
        for row in pq.read_table(digits_folder / f"{name}.parquet").to_pylist():
            width, height = PIL.Image.open(io.BytesIO(row["png"])).size
            assert width % 14 == height % 14 == 0
            assert 28 <= width <= 112
            assert 28 <= height <= 112
            assert width * height <= 16 * 14 * 14


def test_same_seed_writes_the_same_bytes(digits_folder, tmp_path):
    digits.build(tmp_path / "again", seed=0, counts=COUNTS)
    digits.build(tmp_path / "other", seed=1, counts=COUNTS)
    assert digest(tmp_path / "again") == digest(digits_folder)
    assert digest(tmp_path / "other") != digest(digits_folder)


def digest(folder) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_failed_build_leaves_the_old_data_and_nothing_else(tmp_path):
    digits.build(tmp_path / "data", seed=0, counts=COUNTS)
    before = digest(tmp_path)
    with pytest.raises(KeyError):
        digits.build(tmp_path / "data", seed=1, counts={"pairs": 1})
    assert digest(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        digits.build(tmp_path, seed=0, counts=COUNTS)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["digits", str(tmp_path / "file" / "inside")])
    with pytest.raises(SystemExit) as ended:
        digits.main()
    assert ended.value.code == 2
    assert "inside cannot be written: " in capsys.readouterr().err
