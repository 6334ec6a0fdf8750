"""A run with every transform at once: it resumes to the bit, trains what its table says, gives back whole weights."""

import contextlib
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from idefics_jax import sharding
from idefics_jax.convert.orbax import load_model
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.param_transforms import paths, quantize
from idefics_jax.param_tree import probe_batch
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.loop import train
from idefics_jax.training.run import Run, assemble
from idefics_jax.training.step import variables

# The vocabulary is padded to 512; its control tokens begin at 400.
NEW_ROWS = 112


@pytest.fixture(scope="module")
def start(small_values, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("start"))
    values = {**small_values, "steps": 2, "checkpoint_every": 2}
    train(TrainConfig.from_config_dict(values), values, folder)
    return folder


@pytest.fixture(scope="module")
def values(small_values, start):
    adapter = {"rank": 2, "alpha": 8.0, "dropout": 0.2, "init": "kaiming"}
    return {
        **small_values,
        "init_from": str(start),
        "model": {},
        "init_std": (),
        "steps": 4,
        "log_every": 1,
        "checkpoint_every": 2,
        "keep_checkpoints": 10,
        "rows_a_device": 2,
        "neftune_alpha": 5.0,
        "new_rows": NEW_ROWS,
        "quantize": ("text_model/layers/mlp/.*",),
        "lora": {
            "text": {"pattern": "text_model/layers/.*", "dora": True, **adapter},
            "vision": {"pattern": "vision_model/encoder/.*", "dora": False, **adapter},
        },
        "partition": (
            (".*/new_rows", "trainable", 0.1, 0.0),
            (".*/lora_.*", "trainable", 1.0, 0.0),
            ("connector/.*", "trainable", 0.5, 0.1),
            (".*", "frozen"),
        ),
    }


def run(values, workdir):
    train(TrainConfig.from_config_dict(values), values, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines], paths.flatten(load_model(workdir / "model")[0])


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return epath.Path(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(values, whole_folder):
    return run(values, whole_folder)


@contextlib.contextmanager
def without(folder, aside):
    """Moves a folder aside for a while."""
    folder.rename(aside)
    try:
        yield
    finally:
        aside.rename(folder)


def test_going_on_repeats_dropout_and_noise_to_the_bit_and_reads_no_weight_to_start_from(
    values, start, whole, whole_folder, tmp_path
):
    workdir = epath.Path(tmp_path / "run")
    shutil.copytree(whole_folder, workdir)
    for name in ("model", "checkpoints/4"):
        (workdir / name).rmtree()
    with without(start / "model" / "params" / "d", epath.Path(tmp_path / "aside")):
        lines, params = run(values, workdir)
    # The last two steps were run again, and written again.
    assert lines[-2:] == whole[0][-2:]
    for path, leaf in params.items():
        np.testing.assert_array_equal(leaf, whole[1][path], err_msg=path)


def test_what_the_table_freezes_is_the_base_and_old_rows_are_bit_identical(start, whole):
    before, after = paths.flatten(load_model(start / "model")[0]), whole[1]
    for path, leaf in before.items():
        leaf, now = np.asarray(leaf), np.asarray(after[path])
        if path in ("text_model/embed_tokens/embedding", "text_model/lm_head/kernel"):
            old = np.s_[:-NEW_ROWS] if path.endswith("embedding") else np.s_[:, :-NEW_ROWS]
            np.testing.assert_array_equal(now[old], leaf[old], err_msg=path)
            assert not np.array_equal(now, leaf), path
        else:
            layers = path.startswith(("text_model/layers", "vision_model/encoder/layers"))
            trained = path.startswith("connector/") or (layers and path.endswith("kernel"))
            assert np.array_equal(now, leaf) != trained, path


def test_the_start_prints_state_rate_and_dtype_of_every_leaf(values):
    config = TrainConfig.from_config_dict(values)
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use_mesh(mesh, sharding.RULES[config.sharding]):
        run = assemble(config, mesh)
    rows = {line.split()[0]: line.split()[2:] for line in run.plan.table.splitlines()[1:-1]}
    rate = config.optimizer.learning_rate
    assert rows["text_model/layers/mlp/up_proj/kernel"] == ["int8", "frozen"]
    assert rows["text_model/layers/mlp/up_proj/kernel_scale"] == ["float32", "frozen"]
    assert rows["text_model/layers/mlp/up_proj/lora_magnitude"] == ["float32", "trainable", f"{rate:.3g}", "0"]
    assert rows["connector/modality_projection/up_proj/kernel"][1:] == ["trainable", f"{rate / 2:.3g}", "0.1"]
    assert rows["text_model/lm_head/new_rows"][1:] == ["trainable", f"{rate / 10:.3g}", "0"]
    assert len(rows) == len(jax.tree.leaves((run.abstract_state["trainable"], run.abstract_frozen)))


def trained_a_little(trainable):
    """The trained leaves after a step that hardly moves them."""
    return paths.map_paths(lambda path, leaf: leaf + 1e-7 * ("lora_" in path or "new_rows" in path), trainable)


@pytest.mark.parametrize("frozen_dtype", ["float32", "bfloat16"])
def test_the_adapted_model_starts_as_the_quantised_and_cast_base(values, frozen_dtype):
    config = TrainConfig.from_config_dict({**values, "frozen_dtype": frozen_dtype})
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use_mesh(mesh, sharding.RULES[config.sharding]):
        run = assemble(config, mesh)
        state, frozen = run.first_state()
        trainable = state["trainable"]
        adapted = variables(trainable, frozen, tuple(config.lora.values()))
        model, batch = Idefics2(run.plan.sizes), probe_batch(run.plan.sizes)
        logits = jax.jit(lambda tree: model.apply(tree, batch, method=Idefics2.full_logits))
        base, whole = logits({"params": adapted["params"]}), logits(adapted)
        np.testing.assert_allclose(whole, base, atol=1e-5 * np.abs(base).max())
        last = paths.flatten(run.final_params(trained_a_little(trainable), frozen))
    before = paths.flatten(adapted["params"])
    for path in ("vision_model/encoder/layers/mlp/fc1/kernel", "text_model/embed_tokens/embedding"):
        assert last[path].dtype == np.float32, path
        gained = np.abs(np.asarray(last[path]) - np.asarray(before[path], np.float32))
        assert 0 < gained.max() < 1e-5, "in bfloat16 a weight of 0.02 moves by no less than 6e-5"
    assert last["text_model/norm/scale"].dtype == frozen_dtype
    # An int8 kernel, too: multiplied out in bfloat16 it would be off by up to 2e-3 of itself.
    path = "text_model/layers/mlp/up_proj/kernel"
    held = paths.flatten(quantize.dequantize(adapted["params"], jnp.float32))[path]
    assert last[path].dtype == np.float32
    np.testing.assert_allclose(last[path], held, atol=1e-5 * np.abs(held).max())


def test_a_bias_that_trained_beside_an_int8_kernel_keeps_its_float32():
    kernel, bias = jax.random.normal(jax.random.key(0), (4, 3)), jnp.full(3, 1.001)
    frozen = quantize.cast(quantize.quantize({"m": {"kernel": kernel}}, ("m",)), jnp.bfloat16)
    run = Run(types.SimpleNamespace(frozen_dtype="bfloat16", lora={}), *[None] * 7)
    last = run.final_params({"params": {"m": {"bias": bias}}}, frozen)["m"]
    assert (last["bias"].dtype, last["kernel"].dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(last["bias"], bias)
