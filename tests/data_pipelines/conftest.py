"""What the tests of the data share: the embedded data at a small size, and how its pipeline is set up."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import digits
from data_pipelines.pipeline import DataConfig, Stage
from data_pipelines.source_config import SourceConfig
from idefics_jax.batch import BatchShape
from idefics_jax.processor import Processor

COUNTS = {"pairs": 60, "interleaved": 40, "conversations": 60, "numbers": 90, "warmup": 30, "heldout": 60}
KINDS = {"pairs": "pairs", "interleaved": "obelics", "conversations": "cauldron", "numbers": "cauldron"}


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    digits.build(folder, seed=0, counts=COUNTS)
    return folder


@pytest.fixture(scope="session")
def processor(digits_folder) -> Processor:
    return Processor.load(digits_folder / "processor")


@pytest.fixture(scope="session")
def config(digits_folder) -> DataConfig:
    """A short warm-up, then a mixture of every kind of document."""

    def source(name: str, kind: str) -> SourceConfig:
        path = str(digits_folder / f"{name}.parquet")
        return SourceConfig(name, kind, (path,), weight=1.0, image_root=str(digits_folder))

    return DataConfig(
        stages=(
            Stage((source("warmup", "pairs"),), documents=40),
            Stage(tuple(source(name, kind) for name, kind in KINDS.items())),
        ),
        seed=0,
        shape=BatchShape(rows=4, tokens=64, vision_rows=2, patches=32, images=8),
        document_tokens=64,
        virtual_shards=2,
        lookahead=16,
        lookahead_mib=1,
        rounds=3,
        max_bad_fraction=0.0,
        num_threads=0,
        prefetch=1,
        row_groups_mib=16,
        cache_mib=0,
    )


@pytest.fixture
def one_source(config, tmp_path) -> Callable[..., DataConfig]:
    """Returns a function that writes rows to parquet and makes them the only source of the config."""

    def make(rows: list[dict], kind: str, schema: pa.Schema, **changes) -> DataConfig:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "rows.parquet")
        source = SourceConfig("mine", kind, (str(tmp_path / "rows.parquet"),), image_root=str(tmp_path))
        if "shape" in changes:
            changes.setdefault("document_tokens", changes["shape"].tokens)
        return dataclasses.replace(config, **{"stages": (Stage((source,)),), "virtual_shards": 1, **changes})

    return make
