"""What a run writes beside its arrays reaches a bucket, which is one in this process's memory here."""

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from idefics_jax.convert.staging import staged
from idefics_jax.errors import UserError
from idefics_jax.processor import Processor
from idefics_jax.training.curves import draw_curves
from idefics_jax.training.summary import write_summary
from idefics_jax.training.writers import RunWriter, read_metrics


class BucketInMemory(MemoryFileSystem):
    """Objects under gs:// in memory. As in a bucket, nothing can be renamed."""

    protocol = ("gs", "gcs")

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def mv(self, *_, **__):
        raise NotImplementedError("a bucket renames nothing")


@pytest.fixture
def bucket(monkeypatch):
    """The folder gs://bucket/run of an empty bucket."""
    monkeypatch.setattr(BucketInMemory, "store", {})
    monkeypatch.setattr(BucketInMemory, "pseudo_dirs", [""])
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **_: BucketInMemory(skip_instance_cache=True))
    return epath.Path("gs://bucket/run")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_metrics_curves_and_summary_of_a_resumed_run_are_those_of_an_unbroken_one(bucket):
    others = {"train/accuracy": 0.5, "train/grad_norm": 1.0, "perf/steps_per_second": 2.0}
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = RunWriter(bucket, resume_step)
        for step in steps:
            writer.write_scalars(step, {"train/loss": 1 / step, **others})
        writer.close()
    lines = read_metrics(bucket / "metrics.jsonl")
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert all(name.startswith("events.out.tfevents") for name in names(bucket / "events"))
    write_summary(bucket, {"a": np.zeros((2, 3))}, {})
    draw_curves(bucket)
    assert (bucket / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert names(bucket) == ["events", "loss.png", "metrics.jsonl", "summary.json"]


def test_a_folder_is_written_in_its_place_and_removed_if_it_is_not_whole(bucket):
    (bucket / "model" / "old").write_text("1")
    with staged(bucket / "model", replace=True) as folder:
        (folder / "new").write_text("2")
    assert names(bucket / "model") == ["new"]
    with pytest.raises(UserError, match="gs://bucket/run/model is there already"), staged(folder, replace=False):
        pass
    with pytest.raises(TypeError), staged(bucket / "other", replace=False) as folder:
        [(folder / "half").write_text(content) for content in ("3", 3)]
    assert names(bucket) == ["model"]


def test_a_processor_is_saved_and_read_back(bucket, released):
    released.save(bucket)
    read = Processor.load(bucket)
    assert read.image_rules == released.image_rules
    assert read.tokenizer.vocab_size == released.tokenizer.vocab_size
