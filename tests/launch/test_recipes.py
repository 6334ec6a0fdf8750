"""The paper's recipes, run one after another at a tiny size: each starts from what the one before it learnt."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from etils import epath

import idefics_jax
from configs.idefics2_8b import chat, instruct, stage1, stage2
from data_pipelines import digits, messages, pages, prepare
from data_pipelines.filters import Filters
from data_pipelines.kinds import KINDS
from data_pipelines.units import Recipe
from idefics_jax.convert.orbax import load_model
from idefics_jax.errors import UserError
from idefics_jax.param_transforms import paths, positions
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.loop import train
from launch import recipes
from launch.devices import Devices
from tests.launch import tiny_recipes

RECIPES = {"stage1": stage1, "stage2": stage2, "instruct": instruct, "chat": chat}
SEED = 3  # not the recipes' own, to see an override reach every one
COUNTS = {"pairs": 60, "interleaved": 30, "conversations": 60, "numbers": 1, "warmup": 1, "heldout": 1}


def pretrained_parts(folder: Path) -> None:
    """Saves a SigLIP and a Mistral of the tiny size, with the tower's own grid and without Idefics2's tokens."""
    sections = tiny_recipes.model(4, tiny_recipes.PIECES["embedded"]).to_dict()
    other = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = {**sections["vision_config"], "image_size": 4 * 14 + 6}
    decoder = {**sections["text_config"], "bos_token_id": 1, "eos_token_id": 2}
    for name, model in (
        ("vision_model", transformers.SiglipModel(transformers.SiglipConfig(vision_config=tower, text_config=other))),
        ("text_model", transformers.MistralForCausalLM(transformers.MistralConfig(**decoder)).to(torch.bfloat16)),
    ):
        model.save_pretrained(folder / name)


def data(folder: Path) -> None:
    """Writes a file of each kind, called by it, and prepares it."""
    digits.build(folder, seed=0, counts=COUNTS)
    for kind, name in (("obelics", "interleaved"), ("cauldron", "conversations")):
        shutil.copy(folder / f"{name}.parquet", folder / f"{kind}.parquet")
    talk = [{"role": "user", "content": "What is the digit?"}, {"role": "assistant", "content": "the digit 7"}]
    pq.write_table(pa.Table.from_pylist([{"messages": talk}] * 60, schema=messages.SCHEMA), folder / "text.parquet")
    table = pq.read_table(folder / "pairs.parquet")
    pairs = [{**row, "png": enlarged(row["png"])} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(pairs, schema=table.schema), folder / "pairs.parquet")
    scans = [{"images": [{"bytes": row["png"], "path": None}], "texts": [row["caption"]]} for row in pairs]
    pq.write_table(pa.Table.from_pylist(scans, schema=pages.SCHEMA), folder / "pdf.parquet")
    for kind in KINDS:
        root = str(folder) if kind == "obelics" else None
        of_kind = Recipe(kind, root, Filters(), captions=(), features={}, max_pixels=1_000_000, shard_mib=1)
        opened = prepare.open_inputs(of_kind, [str(folder / f"{kind}.parquet")], folder / "shards" / kind)
        prepare.prepare(opened, processes=1, max_bad_fraction=0.0, keep_cut_short=False)


def enlarged(png: bytes) -> bytes:
    """Returns an image at six times its size: the recipes leave out pairs with a side of less than 150 pixels."""
    image, file = PIL.Image.open(io.BytesIO(png)), io.BytesIO()
    image.resize((6 * image.width, 6 * image.height)).save(file, "png")
    return file.getvalue()


def config_file(folder: Path, name: str) -> Path:
    """Writes a recipe's tiny form as a config file."""
    path = folder / f"{name}.py"
    path.write_text(
        f"from configs.idefics2_8b import {name} as recipe\n"
        "from tests.launch.tiny_recipes import shrink\n\n\n"
        f"def get_config():\n    return shrink(recipe.get_config(), {str(folder)!r})\n"
    )
    return path


def train_first_three(folder: Path) -> None:
    """Trains all but the last, one after another, in this process: a process each would take twice as long."""
    start = None
    for name in list(RECIPES)[:-1]:
        config = tiny_recipes.shrink(RECIPES[name].get_config(), str(folder))
        config.seed, config.init_from, config.data.after = SEED, start, start
        values, start = config.to_dict(), str(folder / "work" / name)
        train(TrainConfig.from_config_dict(values), values, epath.Path(start))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All four, trained one after another: the last by the command, which goes on where the others stopped."""
    folder = tmp_path_factory.mktemp("recipes")
    data(folder / "data")
    pretrained_parts(folder)
    train_first_three(folder)
    files = ",".join(str(config_file(folder, name)) for name in RECIPES)
    command = [sys.executable, "-m", "launch.recipes", "--workdir", str(folder / "work"), "--recipes", files]
    done = subprocess.run([*command, "--override", f"seed={SEED}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said").write_text(done.stdout)
    return folder


def params(folder, name):
    return {
        path: np.asarray(leaf) for path, leaf in paths.flatten(load_model(folder / "work" / name / "model")[0]).items()
    }


def test_the_command_trains_what_is_left_from_what_was_last(folder):
    lines = [line for line in (folder / "said").read_text().splitlines() if line.startswith("$") or "already" in line]
    assert [line.partition(" is ")[0] for line in lines[:3]] == [f"{folder}/{name}.py" for name in list(RECIPES)[:3]]
    assert lines[3].endswith(
        f"--config.seed=3 --config.init_from={folder}/work/instruct --config.data.after={folder}/work/instruct"
    )


def test_a_stage_goes_on_in_the_sources_of_the_one_before(folder):
    def reached(name):
        shard = json.loads((folder / "work" / name / "data_position" / "shard_0.json").read_text())
        return json.loads(shard["packed"]["positions"])

    first, second = reached("stage1"), reached("stage2")
    assert first.keys() < second.keys()
    assert all(second[name] > first[name] > 0 for name in first)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"seed={SEED}", "steps=77"], r"stage1.py: .*/stage1 holds a run with other settings \(steps: 2 -> 77\)"),
        ([], r"stage1.py: .* other settings \(seed: 3 -> 0\)"),
        ([f"seed={SEED}", "foo=1"], "'foo'"),
        (["seed"], "'seed' sets nothing; write it as NAME=VALUE"),
        ([f"seed={SEED}", "seed=-1"], "stage1.py: seed is -1"),
    ],
)
def test_overrides_that_a_finished_recipe_was_not_trained_with_are_refused(folder, overrides, message):
    with pytest.raises(UserError, match=message):
        recipes.run_all([folder / f"{name}.py" for name in RECIPES], folder / "work", overrides)


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (["summary.json"], "stage1 has a summary.json but no model and no data_position, and no checkpoint"),
        (["summary.json", "model/config.json", "data_position/about.json"], "no model and no data_position"),
        (
            ["summary.json", "model/config.json", "model/params/d", "checkpoints/2.damaged/a"],
            "but no data_position, and",
        ),
    ],
)
def test_a_finished_recipe_that_lacks_what_the_next_needs_is_refused_before_any_trains(folder, left, message, tmp_path):
    for name in left:
        (tmp_path / "stage1" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stage1" / name).write_text("{}")
    files = [folder / f"{name}.py" for name in ("stage1", "stage2")]
    with pytest.raises(UserError, match=rf"{message}.* put them back from a copy, or remove .* to train .*stage1.py"):
        recipes.run_all(files, tmp_path, [])
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "summary.json").write_text("{}")
    assert recipes.trained(files[0], tmp_path / "stage1", used=True), "its model is of no more use"


def test_a_finished_recipe_writes_its_model_again_from_its_checkpoint(folder, tmp_path, capsys):
    work = tmp_path / "stage1"
    shutil.copytree(folder / "work" / "stage1", work)
    for lost in ("model", "data_position"):
        shutil.rmtree(work / lost)
    recipe = folder / "stage1.py"
    assert not recipes.trained(recipe, work, used=False)
    assert "has no model and no data_position any more" in capsys.readouterr().out
    values = json.loads((work / "run.json").read_text())
    train(TrainConfig.from_config_dict(values), values, epath.Path(work))
    assert recipes.trained(recipe, work, used=False)
    before, after = (paths.flatten(load_model(where / "model")[0]) for where in (folder / "work" / "stage1", work))
    for path, leaf in before.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(after[path]), err_msg=path)


def changed(folder: Path, name: str, change: str, path: Path) -> Path:
    """Writes a recipe's tiny form with a line more."""
    lines = (folder / f"{name}.py").read_text().replace("return shrink(", "config = shrink(")
    path.write_text(f"{lines}    {change}\n    return config\n")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("config.lora.text.pattern = 'text_model/layer/.*'", "'text_model/layer/.*' .*matches"),
        ("config.partition += (('nrom', 'frozen'),)", "'nrom'"),
        ("config.mesh = {'data': 3}", r"mesh sizes .* do not fit 1 device\(s\)"),
        ("config.processor = 'gone'", "gone"),
        ("config.data.after = 'gone'", "data.after is 'gone'"),
        (
            "config.resize_positions = False",
            "work/stage1 have 4 positions a side and the model 8; set resize_positions",
        ),
        ("config.init_from, config.init_parts = None, {'vision_model': 'gone'}", "gone"),
    ],
)
def test_what_a_recipe_would_stop_for_is_known_from_shapes_and_names(folder, change, message, tmp_path):
    recipe = changed(folder, "stage2", f"config.init_from = '{folder}/work/stage1'; {change}", tmp_path / "broken.py")
    config = recipes.check(recipe, tmp_path / "work", [])
    with pytest.raises(UserError, match=f"broken.py: .*{message}"):
        recipes.rehearse_all([(recipe, tmp_path / "work", config)], Devices(count=1, slices=1))


def test_what_a_later_recipe_lacks_is_told_before_the_first_trains(folder, tmp_path):
    change = "config.data.stages.stage2.sources.pdf.paths = ('gone/*.parquet',)"
    second = changed(folder, "stage2", change, tmp_path / "second.py")
    with pytest.raises(
        UserError, match=r"second.py: source 'pdf': paths names 'gone/\*.parquet', which matches no file"
    ):
        recipes.run_all([folder / "stage1.py", second], tmp_path / "work", [])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("files", [[], ["a/stage.py", "b/stage.py"]])
def test_no_recipe_and_two_of_one_name_are_refused(files, tmp_path):
    with pytest.raises(UserError, match="give at least one, each of its own name"):
        recipes.run_all([Path(file) for file in files], tmp_path, [])


def test_positions_and_vocabulary_grow_where_they_should(folder):
    stages = [params(folder, name) for name in RECIPES]
    assert [len(stage[positions.TABLE]) for stage in stages] == [16, 64, 64, 64]
    assert [len(stage["text_model/embed_tokens/embedding"]) for stage in stages] == [402, 402, 403, 403]
    old = [stage["text_model/embed_tokens/embedding"][:400] for stage in stages]
    for stage in old[1:]:
        np.testing.assert_array_equal(stage, old[0])
    weights, grid = positions.cubic_weights(4, 8), stages[0][positions.TABLE].reshape(4, 4, -1)
    wanted = np.einsum("ro,sp,ope->rse", weights, weights, grid).reshape(64, -1)
    np.testing.assert_allclose(stages[1][positions.TABLE], wanted, atol=1e-6)


def test_each_recipe_trains_adapters_connector_and_new_rows(folder):
    stages = [params(folder, name) for name in RECIPES]
    for before, after in zip(stages, stages[1:], strict=False):
        for path in (
            "vision_model/encoder/layers/mlp/fc1/kernel",
            "text_model/layers/self_attn/q_proj/kernel",
            "connector/perceiver_resampler/latents",
        ):
            assert not np.array_equal(before[path], after[path]), path
        for path in ("text_model/norm/scale", "vision_model/embeddings/patch_embedding/kernel"):
            np.testing.assert_array_equal(before[path], after[path], err_msg=path)
        rows = before["text_model/embed_tokens/embedding"][400:402]
        assert not np.array_equal(rows, after["text_model/embed_tokens/embedding"][400:402])


def test_the_last_one_s_result_is_a_model(folder):
    model = idefics_jax.load(folder / "work" / "chat")
    assert model.config.text_config.vocab_size == 403
    assert model.processor.image_rules.longest_edge == 112
    assert all(np.isfinite(leaf).all() for leaf in params(folder, "chat").values())
