"""Answers as a user gets them: from a model with its processor to text, figures and a sheet."""

import dataclasses
import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from configs.eval import digits as eval_config
from idefics_jax import settings
from idefics_jax.chat import chat_parts
from idefics_jax.convert.orbax import save_model
from idefics_jax.documents import Image
from idefics_jax.errors import UserError
from idefics_jax.evaluation.contact_sheet import draw_contact_sheet
from idefics_jax.evaluation.metrics import exact_match
from idefics_jax.evaluation.questions import Question
from idefics_jax.evaluation.run import EvalConfig, evaluate
from idefics_jax.inference.answer import answers, default_decoding
from idefics_jax.model import Model, cut_over
from idefics_jax.param_tree import param_shapes
from idefics_jax.processor import Processor
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.initial import from_sections
from tests.idefics_jax.training import small_run

RIGHT, WRONG = (0, 100, 0), (178, 34, 34)  # darkgreen, firebrick


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    small_run.build_data(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """A small model of random weights."""
    processor = Processor.load(folder / "processor")
    values = small_run.settings(folder)
    sizes = from_sections(TrainConfig.from_config_dict(values), image_token_id=processor.tokenizer.image_token_id)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.3), x.dtype), param_shapes(sizes))
    return Model(sizes, params, processor, jnp.float32, **cut_over(1))


def settings_of(source):
    values = eval_config.get_config().to_dict()
    values["source"]["paths"] = (str(source),)
    values |= {"rows": 4, "max_new_tokens": 3, "limit": 6}
    return settings.build(EvalConfig, values, "config")


def asked(text):
    return chat_parts([{"role": "user", "content": [{"type": "text", "text": text}]}], [], add_generation_prompt=True)


def test_figures_are_those_of_the_samples(model, folder, tmp_path):
    figures = evaluate(model, settings_of(folder / "heldout.parquet"), epath.Path(tmp_path))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert figures == json.loads((tmp_path / "metrics.json").read_text())
    assert figures["questions"] == len(samples) == 6
    assert [s["score"] for s in samples] == [exact_match(s["answer"], s["reference"]) for s in samples]
    assert figures["exact_match"] == np.mean([s["score"] for s in samples])
    assert (tmp_path / "contact_sheet.png").stat().st_size > 10_000


def test_a_damaged_image_ends_an_evaluation_with_its_question(model, folder, tmp_path):
    rows = pq.read_table(folder / "heldout.parquet").slice(0, 2)
    broken = rows.to_pylist()
    broken[1]["images"][0]["bytes"] = broken[1]["images"][0]["bytes"][:-30]
    pq.write_table(pa.Table.from_pylist(broken, schema=rows.schema), tmp_path / "broken.parquet")
    with pytest.raises(UserError, match=r"question broken\.parquet:1: the PNG image cannot be read"):
        evaluate(model, settings_of(tmp_path / "broken.parquet"), epath.Path(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_answers_end_with_a_turn_or_a_document_and_hold_no_image(model):
    tokenizer = model.processor.tokenizer
    decoding = default_decoding(model.processor, max_new_tokens=7)
    assert (decoding.max_new_tokens, decoding.temperature) == (7, 0.0)
    assert set(decoding.stop_ids) == {tokenizer.eos_id, tokenizer.end_of_utterance_id}
    assert set(decoding.banned_ids) == {tokenizer.fake_token_id, tokenizer.image_token_id}


def test_a_sample_depends_on_its_seed_and_on_its_place(model):
    decoding = dataclasses.replace(default_decoding(model.processor, max_new_tokens=8), temperature=1.0)

    def drawn(seed):
        return list(answers(model, [asked("what?")] * 2, decoding, rows=1, seed=seed))

    first = drawn(0)
    assert first[0] != first[1]
    assert drawn(0) == first
    assert set(drawn(1)).isdisjoint(first)


def test_the_command_draws_as_its_flags_say(model, tmp_path):
    save_model(epath.Path(tmp_path / "model"), model.params, model.config, model.processor)
    decoding = default_decoding(model.processor, max_new_tokens=8)
    wanted = {}
    for temperature, top_p in ((0.0, 1.0), (0.7, 0.9)):
        chosen = dataclasses.replace(decoding, temperature=temperature, top_p=top_p)
        (wanted[temperature, top_p],) = answers(model, [asked("what?")], chosen, rows=1, seed=5)
    assert len(set(wanted.values())) == 2
    command = [sys.executable, "-m", "idefics_jax.generate", "--checkpoint", str(tmp_path), "--prompt", "what?"]
    command += ["--temperature=0.7", "--top_p=0.9", "--seed=5", "--max_new_tokens=8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip("\n") == wanted[0.7, 0.9]


def test_processes_share_the_questions_and_give_the_figures_of_one(model, folder, tmp_path):
    save_model(epath.Path(tmp_path / "model"), model.params, model.config, model.processor)
    config = dataclasses.replace(settings_of(folder / "heldout.parquet"), limit=5)
    alone = evaluate(model, config, epath.Path(tmp_path / "alone"))
    command = ["-m", "launch.processes", "-n", "2", "--devices=1", "--", "python", "-m", "idefics_jax.evaluate"]
    command += ["--config=configs/eval/digits.py", f"--checkpoint={tmp_path / 'model'}", f"--out={tmp_path / 'shared'}"]
    changes = {"source.paths": f"('{folder / 'heldout.parquet'}',)", "rows": 1, "max_new_tokens": 3, "limit": 5}
    command += [f"--config.{name}={value}" for name, value in changes.items()]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "answered 3/3" in done.stdout
    assert json.loads((tmp_path / "shared" / "metrics.json").read_text()) == alone
    for file in ("samples.jsonl", "contact_sheet.png"):
        assert (tmp_path / "shared" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


@pytest.mark.parametrize(("score", "there", "absent"), [(1.0, RIGHT, WRONG), (0.0, WRONG, RIGHT)])
def test_the_sheet_shows_what_is_right_in_green_and_what_is_wrong_in_red(score, there, absent, model, tmp_path):
    image = io.BytesIO()
    PIL.Image.new("RGB", (28, 28), "white").save(image, "PNG")
    parts = asked("what?")
    item = Question((Image(image.getvalue()), *parts), "five", "1")
    draw_contact_sheet(epath.Path(tmp_path / "s.png"), model.processor.image_rules, [item], ["5"], [score])
    pixels = np.asarray(PIL.Image.open(tmp_path / "s.png").convert("RGB")).reshape(-1, 3).tolist()
    seen = set(map(tuple, pixels))
    assert there in seen
    assert absent not in seen
