import json
import pickle
import struct
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from idefics_jax.config import Idefics2Config
from idefics_jax.convert.hf import from_hf, to_hf
from idefics_jax.convert.hf_folder import INDEX, SHARD_BYTES, SINGLE, HfFolder, write_hf_folder
from idefics_jax.errors import UserError
from tests.idefics_jax import tiny
from tests.idefics_jax.convert import reference_folder

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def write(path, params, *, config=tiny.CONFIG, processor=None, generation_config=None, shard_bytes=SHARD_BYTES):
    write_hf_folder(path, params, config, processor, generation_config=generation_config, shard_bytes=shard_bytes)


def cast(params, dtype):
    if isinstance(params, dict):
        return {name: cast(child, dtype) for name, child in params.items()}
    return np.asarray(params).astype(dtype)


# Reading.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", ["5GB", "20KB"], ids=["single", "sharded"])
def test_folder_of_transformers_is_read_bit_for_bit(tmp_path, dtype, limit):
    model = reference_folder.save(tmp_path, dtype=dtype, max_shard_size=limit)
    assert (tmp_path / INDEX).exists() == (limit == "20KB")
    folder = HfFolder(tmp_path)
    state = model.state_dict()
    assert list(folder) == sorted(state)
    for name, tensor in state.items():
        array = np.asarray(folder[name])
        assert array.dtype == folder[name].dtype == DTYPES[dtype]
        bits = torch.int32 if dtype == "float32" else torch.int16
        np.testing.assert_array_equal(array.view(f"i{array.itemsize}"), tensor.view(bits).numpy())


def header(**tensors):
    """A safetensors file; each tensor is (dtype, shape, begin, end), with 16 bytes of data after the header."""
    content = {n: {"dtype": d, "shape": s, "data_offsets": [a, b]} for n, (d, s, a, b) in tensors.items()}
    return packed(json.dumps(content).encode(), 16)


def packed(content, data_bytes):
    return struct.pack("<Q", len(content)) + content + bytes(data_bytes)


TWICE = (
    b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]},"a":{"dtype":"F32","shape":[4],"data_offsets":[%d,16]}}'
)
MALFORMED = {
    "overlap": header(a=("F32", [3], 0, 12), b=("F32", [3], 4, 16)),
    "gap": header(a=("F32", [1], 0, 4), b=("F32", [2], 8, 16)),
    "trailing bytes": header(a=("F32", [3], 0, 12)),
    "negative offset": header(a=("F32", [4], -16, 0)),
    "negative shape": header(a=("F32", [-4], 0, 16)),
    "shape smaller than data": header(a=("F32", [2], 0, 16)),
    "shape larger than data": header(a=("F32", [2**33], 0, 16)),
    "shape overflows": header(a=("F32", [2**40, 2**40], 0, 16)),
    "duplicate key": packed(TWICE % (2, 8, 8), 16),
    "duplicate key over the same bytes": packed(TWICE % (4, 16, 0), 16),
    "truncated data": header(a=("F32", [4], 0, 16))[:-1],
    "truncated header": header(a=("F32", [4], 0, 16))[:20],
    "huge header": struct.pack("<Q", 2**60) + b"{}",
    "header beyond the file": struct.pack("<Q", 10_000) + b"{}",
    "unknown dtype": header(a=("F33", [4], 0, 16)),
    "not JSON": packed(b"\x80\x04pickle", 16),
    "JSON list": packed(b"[1, 2]", 0),
    "not UTF-8": packed(b'{"\xff":1}', 16),
    "eight zero bytes": bytes(8),
    "empty": b"",
    "pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_file_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(UserError, match="is not a whole safetensors file .*; download it again") as error:
        HfFolder(tmp_path)
    assert str(tmp_path / SINGLE) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dtype", "size"), [("F64", 2), ("I32", 4), ("I8", 16), ("F8_E4M3", 16)])
def test_dtype_that_is_not_supported_is_named(tmp_path, dtype, size):
    (tmp_path / SINGLE).write_bytes(header(weight=(dtype, [size], 0, 16)))
    with pytest.raises(UserError, match=f"weight is {dtype}; supported are F32, BF16, F16"):
        HfFolder(tmp_path)


def test_every_change_of_a_header_that_matters_is_refused(tmp_path):
    write(tmp_path / "hf", tiny.raw_params())
    whole = (tmp_path / "hf" / SINGLE).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    entries, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    del entries["__metadata__"]
    names = sorted(entries)
    rng = np.random.default_rng(0)
    for trial in range(180):
        changed = json.loads(json.dumps(entries))
        name = str(rng.choice(names))
        entry, kind = changed[name], ("dim", "offset", "dtype", "name", "drop", "rank")[trial % 6]
        step = int(rng.choice([-1, 1, 7, 2**40]))
        if kind == "dim":
            entry["shape"][rng.integers(len(entry["shape"]))] += step
        elif kind == "offset":
            entry["data_offsets"][rng.integers(2)] += step
        elif kind == "dtype":
            entry["dtype"] = str(rng.choice(["F16", "BF16", "I32", "F64", "U8", "x"]))
        elif kind == "name":
            changed[name + "x"] = changed.pop(name)
        elif kind == "drop":
            del changed[name]
        else:
            entry["shape"].append(1)
        (tmp_path / "hf" / SINGLE).write_bytes(packed(json.dumps(changed).encode(), 0) + data)
        with pytest.raises(UserError):
            from_hf(HfFolder(tmp_path / "hf"), tiny.CONFIG)


def sharded(path):
    write(path, tiny.raw_params(), shard_bytes=10_000)
    return json.loads((path / INDEX).read_text())


@pytest.mark.parametrize(
    "place",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "~/m.safetensors", "m.safetensors\0",
     "a\\b.safetensors", "m\n.safetensors", "model.bin", "", "x" * 300 + ".safetensors", 7, None, ["m.safetensors"]],
    ids=repr,
)  # fmt: skip
def test_index_that_points_elsewhere_is_refused(tmp_path, place):
    index = sharded(tmp_path / "hf")
    index["weight_map"]["lm_head.weight"] = place
    (tmp_path / "hf" / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"places lm_head.weight in .*only .safetensors files beside the index"):
        HfFolder(tmp_path / "hf")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError, match=INDEX):
        HfFolder(tmp_path)


def test_index_and_files_must_agree(tmp_path):
    index = sharded(tmp_path / "hf")
    files = sorted(set(index["weight_map"].values()))
    moved = {name: files[0] if name == "lm_head.weight" else file for name, file in index["weight_map"].items()}
    (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(UserError, match=r"disagree on lm_head.weight"):
        HfFolder(tmp_path / "hf")
    (tmp_path / "hf" / INDEX).write_text(json.dumps(index))
    (tmp_path / "hf" / files[1]).unlink()
    with pytest.raises(UserError, match=f"{files[1]} does not exist"):
        HfFolder(tmp_path / "hf")


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl"])
def test_pickle_is_refused_by_name_and_never_opened(tmp_path, name):
    folder, marker = tmp_path / "hf", tmp_path / "marker"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(UserError, match=f"{name}, a format that can run code .*convert it to safetensors first"):
        HfFolder(folder)
    assert not marker.exists()


# Writing.


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_file_is_byte_for_byte_the_one_of_transformers(tmp_path, dtype):
    reference_folder.save(tmp_path / "theirs", dtype=dtype, max_shard_size="5GB")
    config = Idefics2Config.load(tmp_path / "theirs")
    write(tmp_path / "ours", from_hf(HfFolder(tmp_path / "theirs"), config), config=config)
    assert (tmp_path / "ours" / SINGLE).read_bytes() == (tmp_path / "theirs" / SINGLE).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_keep_to_their_size_and_hold_everything_once(tmp_path, dtype):
    params = cast(tiny.raw_params(), DTYPES[dtype])
    write(tmp_path / "hf", params, shard_bytes=4_000)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    wanted = to_hf(params, tiny.CONFIG)
    assert index["weight_map"].keys() == wanted.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in wanted.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    for file in files:
        tensors = load_file(tmp_path / "hf" / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        assert len(tensors) == 1 or sum(array.nbytes for array in tensors.values()) <= 4_000
        assert all(tensors[name].tobytes() == wanted[name].tobytes() for name in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, 20_000], ids=["single", "sharded"])
def test_transformers_loads_the_folder_without_a_word(tmp_path, dtype, shard_bytes):
    theirs = reference_folder.save(tmp_path / "theirs", dtype=dtype, max_shard_size="5GB")
    config = Idefics2Config.load(tmp_path / "theirs")
    write(tmp_path / "hf", from_hf(HfFolder(tmp_path / "theirs"), config), config=config, shard_bytes=shard_bytes)
    with reference_folder.silence() as said:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            tmp_path / "hf", output_loading_info=True
        )
    assert said == []
    assert not any(info.values()), info
    assert type(model) is transformers.Idefics2ForConditionalGeneration
    assert model.dtype == getattr(torch, dtype)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())


def test_tied_model_goes_to_transformers_and_back(tmp_path):
    theirs = reference_folder.save(tmp_path / "theirs", dtype="float32", max_shard_size="5GB", tie=True)
    config = Idefics2Config.load(tmp_path / "theirs")
    params = from_hf(HfFolder(tmp_path / "theirs"), config)
    assert "lm_head" not in params["text_model"]
    write(tmp_path / "ours", params, config=config)
    with reference_folder.silence() as said:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            tmp_path / "ours", output_loading_info=True
        )
    assert said == []
    assert not any(info.values()), info
    assert model.lm_head.weight.data_ptr() == model.model.text_model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight)


def test_processor_gives_generation_config_its_ids(tmp_path, released):
    write(tmp_path / "hf", tiny.raw_params(), processor=released)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, [2, 32002], 0)


def test_given_generation_config_is_written_unchanged(tmp_path, released):
    given = {"bos_token_id": 5, "max_new_tokens": 7}
    write(tmp_path / "hf", tiny.raw_params(), processor=released, generation_config=given)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == given


def test_folder_that_is_there_is_not_touched(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        write(tmp_path / "hf", tiny.raw_params())
    assert [path.name for path in tmp_path.rglob("*")] == ["hf", "notes.txt"]


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "hf").mkdir()
    write(tmp_path / "hf", tiny.raw_params())
    assert (tmp_path / "hf" / SINGLE).exists()


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    """The disk is full for a process that may write no file above 20 kB."""
    program = f"""
        import resource
        from idefics_jax.convert.hf_folder import write_hf_folder
        from idefics_jax.convert.orbax import save_model
        from idefics_jax.errors import UserError
        from tests.idefics_jax import tiny
        params = tiny.raw_params()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_model("{tmp_path}/model", params, tiny.CONFIG, None)
        except UserError as error:
            print("ERROR", error)
        try:
            write_hf_folder("{tmp_path}/hf", params, tiny.CONFIG, None, generation_config=None, shard_bytes=10**9)
        except UserError as error:
            print("ERROR", error)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    for name in ("model", "hf"):
        assert f"ERROR could not write {tmp_path}/{name} (File too large); free some space" in done.stdout, (
            done.stdout + done.stderr
        )
    assert list(tmp_path.iterdir()) == []
