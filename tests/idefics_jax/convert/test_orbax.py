import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from idefics_jax import sharding
from idefics_jax.convert.orbax import load_model, model_shapes, save_model
from idefics_jax.errors import UserError
from idefics_jax.param_transforms.paths import flatten
from idefics_jax.param_tree import param_shardings
from tests.idefics_jax import tiny

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def random_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(dtype), tiny.raw_params())


def assert_same_bits(found, wanted):
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype
        assert np.asarray(found[path]).tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [np.asarray, jax.numpy.asarray], ids=["numpy", "jax"])
def test_parameters_come_back_bit_for_bit(tmp_path, dtype, kind):
    params = jax.tree.map(kind, random_params(dtype))
    save_model(tmp_path / "model", params, tiny.CONFIG, None)
    loaded, config = load_model(tmp_path / "model")
    assert config == tiny.CONFIG
    assert_same_bits(loaded, params)


def test_parameters_are_loaded_where_they_belong(tmp_path):
    save_model(tmp_path / "model", random_params(), tiny.CONFIG, None)
    mesh = sharding.make_mesh({"fsdp": -1})
    wanted = param_shardings(tiny.CONFIG, mesh, sharding.RULES["fsdp"])
    loaded, _ = load_model(tmp_path / "model", shardings=wanted)
    assert flatten(jax.tree.map(lambda x: x.sharding, loaded)) == flatten(wanted)
    assert_same_bits(loaded, random_params())


def test_processor_and_generation_config_lie_beside_the_weights(tmp_path, released):
    save_model(tmp_path / "model", random_params(), tiny.CONFIG, released, generation_config={"eos_token_id": 2})
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == released.tokenizer.model
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == {"eos_token_id": 2}


def test_newer_model_takes_the_place_of_the_older(tmp_path):
    save_model(tmp_path / "model", tiny.raw_params(), tiny.CONFIG, None)
    save_model(tmp_path / "model", random_params(), tiny.CONFIG, None)
    assert_same_bits(load_model(tmp_path / "model")[0], random_params())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    (tmp_path / ".model.partial" / "params").mkdir(parents=True)
    save_model(tmp_path / "model", random_params(), tiny.CONFIG, None)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_model_set_aside_by_a_killed_writer_survives_a_writer_that_fails(tmp_path):
    save_model(tmp_path / "model", random_params(), tiny.CONFIG, None)
    (tmp_path / "model").rename(tmp_path / ".model.old")

    class Broken:
        def save(self, folder):
            raise OSError("no space")

    with pytest.raises(UserError, match="could not write .*no space"):
        save_model(tmp_path / "model", tiny.raw_params(), tiny.CONFIG, Broken())
    assert_same_bits(load_model(tmp_path / "model")[0], random_params())


def test_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        save_model(tmp_path / "model", random_params(), tiny.CONFIG, None)
    assert (tmp_path / "model" / "thesis.tex").read_text() == "mine"


def test_parameters_of_another_config_are_not_saved(tmp_path):
    params = random_params()
    del params["text_model"]["norm"]
    with pytest.raises(UserError, match=r"missing \(1\): text_model/norm/scale"):
        save_model(tmp_path / "model", params, tiny.CONFIG, None)
    assert list(tmp_path.iterdir()) == []


def test_config_of_another_size_is_refused_before_weights_are_read(tmp_path):
    save_model(tmp_path / "model", random_params(), tiny.CONFIG, None)
    shutil.rmtree(tmp_path / "model" / "params" / "ocdbt.process_0")  # the weights themselves
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 32
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"mlp/up_proj/kernel is \[2, 16, 24\] and should be \[2, 16, 32\]"):
        load_model(tmp_path / "model")


# Orbax leaves the reads that were under way to an event loop it has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("part", ["_METADATA", "manifest.ocdbt", "ocdbt.process_0", "d"])
def test_missing_part_is_one_sentence(tmp_path, part):
    save_model(tmp_path / "model", random_params(), tiny.CONFIG, None)
    path = tmp_path / "model" / "params" / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="params cannot be read, a part of it is missing or damaged") as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_flipped_bit_is_named_by_its_leaf(tmp_path):
    save_model(tmp_path / "model", random_params(), tiny.CONFIG, None)
    path = max((p for p in (tmp_path / "model/params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"params is damaged: \[.*\] and 0 more leaves are not what was saved"):
        load_model(tmp_path / "model")


def test_shapes_are_known_without_the_weights(tmp_path):
    save_model(tmp_path / "model", random_params(np.float16), tiny.CONFIG, None)
    shutil.rmtree(tmp_path / "model" / "params" / "ocdbt.process_0")
    shapes = flatten(model_shapes(tmp_path / "model"))
    assert {path: (x.shape, x.dtype) for path, x in shapes.items()} == {
        path: (x.shape, np.float16) for path, x in flatten(tiny.raw_params()).items()
    }
