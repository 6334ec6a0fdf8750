"""Damaged files and invented rows for seconds; `python -m benchmarks.fuzz` goes on for as long as it is told to."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_targets
from data_pipelines import training_form
from data_pipelines.kinds import KINDS
from data_pipelines.packed_rows import Candidate, encode
from data_pipelines.rejection import BadRow, Rejected
from idefics_jax.batch import BatchShape
from idefics_jax.documents import Document, EndOfUtterance, Image
from tests.data_pipelines import poison

ROOT = Path(__file__).parents[2]
SHAPE = BatchShape(rows=1, tokens=256, vision_rows=2, patches=128, images=8)
# Files read of each target: about a third of a second of each.
READ = {"jpeg": 300, "png": 500, "webp": 300, "gif": 300, "record": 1500, "tar": 150, "jsonl": 300, "manifest": 150}
READ_OTHERS = 60


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, fuzz_targets.Target]:
    return fuzz_targets.targets(tmp_path_factory.mktemp("fuzz"))


NAMES = ("jpeg", "png", "webp", "gif", *(f"parquet-{kind}" for kind in KINDS), "record", "shard", "manifest")
NAMES += ("tar", "jsonl", "jsonl.gz", "downloads-parquet", "downloads-tar")


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it then refuses
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(name, targets):
    target, said, incomplete = targets[name], [], 0
    for number in range(READ.get(name, READ_OTHERS)):
        try:
            incomplete += not target.read(fuzz_targets.mutated(target, name, 0, number))
        except fuzz_targets.REFUSALS as error:
            said.append(str(error))
    assert incomplete + len(said) > 0
    assert all(said)
    assert max(map(len, said), default=0) < 2000


def test_every_target_reads_its_whole_files(targets):
    assert set(targets) == set(NAMES)
    for name, target in targets.items():
        assert all(target.read(seed) for seed in target.seeds), name


def test_damage_is_had_again_and_seldom_none(targets):
    files = [fuzz_targets.mutated(targets["png"], "png", 0, number) for number in range(50)]
    assert files == [fuzz_targets.mutated(targets["png"], "png", 0, number) for number in range(50)]
    assert sum(data in targets["png"].seeds for data in files) < 10
    assert files != [fuzz_targets.mutated(targets["png"], "png", 1, number) for number in range(50)]


def test_the_command_reads_for_as_long_as_told(tmp_path):
    command = [sys.executable, "-m", "benchmarks.fuzz", "--seconds=1", "--target=jsonl", f"--findings={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("jsonl ")


LOOSE = st.none() | st.text(st.characters(), max_size=12) | st.sampled_from([poison.SPELT, "<image>" * 3, "\ud800", ""])
PICTURES = st.none() | st.sampled_from([data for data, _ in poison.images().values() if len(data) < 3000])


def _value(column: training_form.Column) -> st.SearchStrategy:
    """Returns values of a column's form, nulls anywhere, members of groups missing or too many."""
    if isinstance(column, list):
        return st.none() | st.lists(_value(column[0]), max_size=4)
    if isinstance(column, dict):
        members = {name: _value(form) for name, form in column.items()}
        return st.none() | st.fixed_dictionaries({}, optional={**members, "more": LOOSE})
    return PICTURES if column == "bytes" else LOOSE


@pytest.mark.parametrize("kind", KINDS)
def test_any_row_is_a_document_or_a_bad_row_and_forges_nothing(kind, processor):
    module, columns = KINDS[kind], training_form.COLUMNS[kind]

    @settings(max_examples=150, deadline=None)
    @given(st.fixed_dictionaries({name: _value(form) for name, form in columns.items()}))
    def check(row):
        try:
            parts, units = module.parts(row, None), module.units(row)
            pieces = [module.parts(module.piece(row, i, i + 1), None) for i in range(units)] if units > 1 else []
        except BadRow:
            return
        for some in (parts, *pieces):
            found = encode(Document(some, "s", "0"), processor, SHAPE)
            assert isinstance(found, Candidate | Rejected)
            if isinstance(found, Candidate):
                assert_nothing_is_forged(some, found.encoded.tokens.tolist(), processor)

    check()


def assert_nothing_is_forged(parts, tokens, processor) -> None:
    tokenizer, images = processor.tokenizer, sum(isinstance(part, Image) for part in parts)
    assert tokens.count(tokenizer.image_token_id) == images * processor.num_latents
    assert tokens.count(tokenizer.end_of_utterance_id) == sum(isinstance(part, EndOfUtterance) for part in parts)
    assert tokens.count(tokenizer.bos_id) == tokens.count(tokenizer.eos_id) == 1
