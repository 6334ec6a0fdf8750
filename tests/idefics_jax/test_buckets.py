"""A folder in a bucket stays one; what cannot be done there is a sentence."""

import importlib.util
import os

import pytest

import idefics_jax
from data_pipelines import parquet
from idefics_jax import buckets
from idefics_jax.convert.hf_folder import open_safetensors
from idefics_jax.errors import UserError


def test_a_folder_in_a_bucket_is_not_taken_for_one_on_this_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.fspath(buckets.absolute("gs://bucket/run")) == "gs://bucket/run"
    assert os.fspath(buckets.absolute("run")) == f"{tmp_path}/run"
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bucket_is_refused():
    with pytest.raises(UserError, match="s3://bucket/run is neither on a disk nor in a bucket"):
        buckets.absolute("s3://bucket/run")


def test_without_gcsfs_a_bucket_is_a_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gs://bucket/run needs gcsfs.* install requirements-tpu.txt"):
        idefics_jax.load("gs://bucket/run")
    with pytest.raises(UserError, match="gs://bucket/run needs gcsfs"):
        idefics_jax.Processor.load("gs://bucket/run")


def test_what_is_read_from_a_disk_alone_says_so():
    with pytest.raises(UserError, match="gs://b/model.safetensors: safetensors can only be read from a disk; mount"):
        open_safetensors("gs://b/model.safetensors")
    with pytest.raises(UserError, match=r"paths names 'gs://b/\*.parquet'; data is read from a disk: mount the bucket"):
        parquet.expand(["gs://b/*.parquet"], where="paths")


class Bucket:
    """Stands for a folder in a bucket: it can only be written whole, object by object."""

    def __init__(self):
        self.objects = {}

    def __fspath__(self):
        return "gs://bucket/run"

    def __truediv__(self, name):
        bucket = self

        class Object:
            def write_bytes(self, content):
                bucket.objects.setdefault(name, []).append(content)

        return Object()


def test_what_grows_is_delivered_when_it_has_changed_and_at_the_end():
    bucket = Bucket()
    outbox = buckets.Outbox(bucket)
    (outbox.path / "events").mkdir()
    (outbox.path / "events" / "one").write_bytes(b"1")
    (outbox.path / "lines").write_bytes(b"a\n")
    outbox.deliver()
    outbox.deliver()
    assert bucket.objects == {"events/one": [b"1"], "lines": [b"a\n"]}
    with (outbox.path / "lines").open("ab") as file:
        file.write(b"b\n")
    outbox.deliver_now_and_then()
    assert len(bucket.objects["lines"]) == 1, "not at every line"
    outbox.close()
    assert bucket.objects == {"events/one": [b"1"], "lines": [b"a\n", b"a\nb\n"]}
    assert not outbox.path.exists()


def test_what_grows_on_a_disk_grows_in_its_place(tmp_path):
    outbox = buckets.Outbox(tmp_path)
    (outbox.path / "lines").write_text("a\n")
    outbox.close()
    assert (tmp_path / "lines").read_text() == "a\n"
