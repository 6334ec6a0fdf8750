"""The processor's folder, read by transformers and read back; folders of others; folders that must be refused."""

import json
import shutil

import pytest
from absl import logging
from transformers import AutoProcessor, AutoTokenizer, Idefics2Config, LlamaTokenizer
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.processing_idefics2 import Idefics2Processor

from idefics_jax.errors import UserError
from idefics_jax.images import ImageRules
from idefics_jax.processor import Processor
from idefics_jax.tokenizer import Tokenizer, train_tokenizer

RULES = ImageRules(
    patch_size=14, longest_edge=112, shortest_edge=28, positions_per_side=9, split=True, max_pixels=1_000_000
)
TEXT = "User:<image>What  digit?\n  Two   spaces<end_of_utterance>\nAssistant:"


@pytest.fixture(scope="session")
def small() -> Processor:
    model = train_tokenizer(["What   digit  is this? 7", "User: Assistant:\n\n3, 1 and 4."] * 20, 400)
    return Processor(Tokenizer(model), RULES, 4)


@pytest.fixture
def folder(small, tmp_path):
    small.save(tmp_path)
    return tmp_path


def edit(path, **changes) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def model_config(
    folder, *, latents: int, image_size: int, patch_size: int, image_token_id: int, vocab_size: int = 33_000
) -> None:
    config = Idefics2Config(
        vision_config={"image_size": image_size, "patch_size": patch_size},
        perceiver_config={"resampler_n_latents": latents, "hidden_size": 64},
        text_config={"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 8, "vocab_size": vocab_size},
        image_token_id=image_token_id,
    )
    config.save_pretrained(folder)


def test_a_saved_folder_reads_back(small, folder):
    ours = Processor.load(folder)
    assert ours.tokenizer.model == small.tokenizer.model
    assert ours.image_rules == small.image_rules
    assert ours.num_latents == small.num_latents
    assert not list(folder.glob("*.part"))


def test_transformers_loads_a_saved_folder(small, folder):
    theirs = AutoProcessor.from_pretrained(folder)
    assert isinstance(theirs, Idefics2Processor)
    assert theirs.image_seq_len == 4
    assert theirs.image_processor.do_image_splitting
    assert theirs.image_processor.size.longest_edge == 112
    assert theirs.tokenizer.pad_token_id == theirs.tokenizer.unk_token_id == 0
    assert theirs.tokenizer.padding_side == "left"
    ids = [small.tokenizer.fake_token_id, small.tokenizer.image_token_id, small.tokenizer.end_of_utterance_id]
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    assert theirs.tokenizer.convert_tokens_to_ids(names) == ids
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == theirs.tokenizer(TEXT)["input_ids"]


def test_transformers_renders_the_chat_template_of_a_saved_folder(folder):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    rendered = AutoProcessor.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == "User:<image>What?<end_of_utterance>\nAssistant:"


def test_a_folder_saved_again_by_transformers_reads_the_same(small, folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    AutoProcessor.from_pretrained(folder).save_pretrained(again)
    assert not (again / "tokenizer.model").exists()
    ours = Processor.load(again)
    assert ours.image_rules == small.image_rules
    assert ours.num_latents == small.num_latents
    text = TEXT.replace("<", "")
    assert ours.tokenizer.encode(text, at_start=True) == small.tokenizer.encode(text, at_start=True)


def test_a_folder_of_the_released_layout_is_read(mistral_model, tmp_path):
    """tokenizer.model, preprocessor_config.json, processor_config.json and the model's config.json: nothing of ours."""
    shutil.copy(mistral_model, tmp_path / "tokenizer.model")
    Idefics2ImageProcessorPil(do_image_splitting=True).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Idefics2Processor", "image_seq_len": 64}')
    model_config(tmp_path, latents=64, image_size=980, patch_size=14, image_token_id=32001)
    ours = Processor.load(tmp_path)
    assert ours.num_latents == 64
    assert ours.image_rules == ImageRules(
        patch_size=14,
        longest_edge=980,
        shortest_edge=378,
        positions_per_side=70,
        split=True,
        max_pixels=64_000_000,
    )
    assert ours.tokenizer.end_of_utterance_id == 32002


def test_tokenizer_json_rules_where_it_ranks_merges_otherwise(mistral_model, tmp_path):
    """transformers 5 converts a bare tokenizer.model with the merges of runs of spaces first, and saves them so."""
    shutil.copy(mistral_model, tmp_path / "tokenizer.model")
    bare = LlamaTokenizer.from_pretrained(tmp_path, legacy=False, add_bos_token=True, add_eos_token=False)
    theirs = Idefics2Processor(Idefics2ImageProcessorPil(), bare)
    theirs.save_pretrained(tmp_path)
    model_config(tmp_path, latents=64, image_size=980, patch_size=14, image_token_id=32001)
    ours = Processor.load(tmp_path)
    text = "Two  spaces,    four\n   three"
    assert ours.tokenizer.encode(text, at_start=True) == theirs.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ours.tokenizer.encode(text, at_start=True) != Tokenizer.load(mistral_model).encode(text, at_start=True)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is False; only True"),
        ("preprocessor_config.json", {"resample": 3}, "resample is 3; only 2"),
        ("preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.5]}, "image_mean is"),
        (
            "preprocessor_config.json",
            {"size": {"height": 9, "width": 9}},
            "it must have longest_edge and shortest_edge",
        ),
        ("preprocessor_config.json", {"patch_size": None}, "put the model's config.json beside it"),
        ("preprocessor_config.json", {"patch_size": "14"}, "patch_size is '14'"),
        ("preprocessor_config.json", {"do_image_splitting": "yes"}, "split is 'yes'"),
        ("processor_config.json", {"image_seq_len": 0}, "num_latents is 0"),
        ("tokenizer_config.json", {"legacy": True}, "legacy is True; only False"),
        ("tokenizer_config.json", {"add_bos_token": False}, "add_bos_token is False; only True"),
        ("added_tokens.json", {"<image>": 7}, "gives <image> the id 7"),
    ],
    ids=str,
)
def test_values_that_are_not_supported_are_refused_by_name(folder, file, change, message):
    edit(folder / file, **change)
    with pytest.raises(UserError, match=message):
        Processor.load(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"model": 5}),
        ("tokenizer.json", {"added_tokens": [5]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
    ],
)
def test_damaged_files_of_the_tokenizer_are_told_with_their_folder(folder, file, content):
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **content}))
    with pytest.raises(UserError, match="the tokenizer's files in .* are damaged .*; copy them again"):
        Processor.load(folder)


def test_missing_and_damaged_files_are_named(folder, tmp_path_factory):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        Processor.load(folder / "nowhere")
    with pytest.raises(UserError, match="neither tokenizer.model nor tokenizer.json"):
        Processor.load(tmp_path_factory.mktemp("empty"))
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(UserError, match="processor_config.json is not JSON"):
        Processor.load(folder)
    (folder / "processor_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        Processor.load(folder)
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="holds no preprocessor_config.json"):
        Processor.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"latents": 8}, "resampler_n_latents = 8 and the processor beside it 4"),
        ({"patch_size": 7}, "patch_size = 7 and the processor beside it 14"),
        ({"image_size": 140}, "= 10 and the processor beside it 9"),
        ({"image_token_id": 9}, "image_token_id = 9"),
    ],
    ids=str,
)
def test_a_processor_of_another_model_is_refused(small, folder, change, message):
    right = {"latents": 4, "image_size": 126, "patch_size": 14, "image_token_id": small.tokenizer.image_token_id}
    model_config(folder, **{**right, **change})
    if message is None:
        assert Processor.load(folder).image_rules == small.image_rules
    else:
        with pytest.raises(UserError, match=message):
            Processor.load(folder)


def test_a_model_without_a_row_for_every_id_is_warned_of(small, folder, monkeypatch):
    """As the released base model: it has 32002 embeddings, none for <end_of_utterance>."""
    right = {"latents": 4, "image_size": 126, "patch_size": 14, "image_token_id": small.tokenizer.image_token_id}
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *arguments: warnings.append(arguments[2:]))
    for vocab_size in (small.tokenizer.vocab_size, small.tokenizer.vocab_size - 1):
        model_config(folder, **right, vocab_size=vocab_size)
        Processor.load(folder)
    assert warnings == [(small.tokenizer.vocab_size - 1, small.tokenizer.vocab_size)]


def test_another_chat_template_is_warned_of(folder, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *arguments: warnings.append(arguments))
    Processor.load(folder)
    assert warnings == []
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    Processor.load(folder)
    assert "is not the released chat template" in warnings[0][0]
