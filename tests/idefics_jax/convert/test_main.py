import json

import pytest
import torch
import transformers

from idefics_jax.config import Idefics2Config
from idefics_jax.convert.__main__ import main
from idefics_jax.convert.hf_folder import SINGLE
from tests.idefics_jax.convert import reference_folder


@pytest.fixture(scope="module")
def folders(released_folder, tmp_path_factory):
    """A Hugging Face folder, the model folder made of it, and the Hugging Face folder made of that."""
    root = tmp_path_factory.mktemp("commands")
    (root / "hf").symlink_to(released_folder)
    assert main(["from-hf", str(root / "hf"), str(root / "model")]) == 0
    assert main(["to-hf", str(root / "model"), str(root / "back")]) == 0
    return root


def refused(capsys, *arguments):
    """Runs a command that must fail, and returns its one line."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_folder_comes_back_as_it_was(folders):
    names = sorted(path.name for path in (folders / "hf").iterdir())
    assert sorted(path.name for path in (folders / "back").iterdir()) == names
    for name in names:
        if name.endswith(".json"):
            assert json.loads((folders / "back" / name).read_text()) == json.loads((folders / "hf" / name).read_text())
        else:
            assert (folders / "back" / name).read_bytes() == (folders / "hf" / name).read_bytes()


def test_transformers_loads_model_and_processor_without_a_word(folders):
    with reference_folder.silence() as said:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            folders / "back", output_loading_info=True
        )
        processor = transformers.AutoProcessor.from_pretrained(folders / "back")
    assert said == []
    assert not any(info.values()), info
    assert type(model) is transformers.Idefics2ForConditionalGeneration
    assert type(processor) is transformers.Idefics2Processor
    assert model.generation_config.eos_token_id == [2, 32002]
    assert processor(text="What?")["input_ids"] == [[1, 1824, 28804]]


def test_work_directory_is_converted_by_the_model_in_it(folders, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "model").symlink_to(folders / "model")
    assert main(["to-hf", str(tmp_path / "work"), str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / SINGLE).read_bytes() == (folders / "hf" / SINGLE).read_bytes()


def test_bfloat16_stays_bfloat16(tmp_path):
    theirs = reference_folder.save(tmp_path / "hf", dtype="bfloat16", max_shard_size="5GB")
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "model")]) == 0
    assert main(["to-hf", str(tmp_path / "model"), str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / SINGLE).read_bytes() == (tmp_path / "hf" / SINGLE).read_bytes()
    assert Idefics2Config.load(tmp_path / "back").extra["dtype"] == "bfloat16"
    assert theirs.dtype == torch.bfloat16


def test_compare_says_by_its_status_whether_they_agree(tmp_path, capsys):
    model = reference_folder.save(tmp_path / "a", dtype="float32", max_shard_size="5GB")
    with torch.no_grad():
        model.lm_head.weight += 0.1
    model.save_pretrained(tmp_path / "b")
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "a"), "--seed", "3"]) == 0
    assert "the two agree" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--seed", "3"]) == 1
    assert "the two DIFFER" in capsys.readouterr().out
    for arguments, said in (
        (["--seed", "-1"], "--seed is -1; it must be 0 or more"),
        (["--prompt", "hi"], "holds no processor that transformers can read"),
    ):
        assert main(["compare", str(tmp_path / "a"), str(tmp_path / "a"), *arguments]) == 2
        assert said in capsys.readouterr().err


def test_inspect_prints_a_table(folders, capsys):
    assert main(["inspect", str(folders / "back")]) == 0
    assert "| lm_head.weight " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["frm-hf", "a", "b"], "invalid choice: 'frm-hf'"),
        (["from-hf", "a"], "required: target"),
        (["inspect", "a", "b"], "unrecognized arguments: b"),
        (["inspect", "a", "--sed=1"], "unrecognized arguments: --sed=1"),
        (["compare", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["compare", "a", "b", "--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_misspelt_command_is_one_line(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "command", [["from-hf", "x", "y"], ["to-hf", "x", "y"], ["inspect", "x"], ["compare", "x", "x"]]
)
def test_folder_that_is_not_there_is_one_line(capsys, command):
    assert "x is not a folder" in refused(capsys, *command)


def test_each_command_says_which_way_it_goes(folders, tmp_path, capsys):
    assert "to-hf reads a model folder" in refused(capsys, "to-hf", folders / "hf", tmp_path / "x")
    assert "from-hf reads a Hugging Face folder" in refused(capsys, "from-hf", folders / "model", tmp_path / "x")


def test_target_that_is_there_is_not_touched(folders, capsys):
    assert "is there already" in refused(capsys, "from-hf", folders / "hf", folders / "model")
    assert "is there already" in refused(capsys, "to-hf", folders / "model", folders / "back")


def damaged(folder, name):
    path = folder / "hf" / name
    if name == SINGLE:
        path.write_bytes(path.read_bytes()[:-1])
    elif name == "config.json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llava"}))
    else:
        path.write_text("[]")
    return folder / "hf"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (SINGLE, "model.safetensors is not a whole safetensors file"),
        ("config.json", "config.json has model_type 'llava'"),
        ("generation_config.json", "generation_config.json holds a list"),
    ],
)
def test_damaged_source_is_one_line_and_leaves_nothing(tmp_path, capsys, name, words):
    reference_folder.save(tmp_path / "hf", dtype="float32", max_shard_size="5GB")
    (tmp_path / "out").mkdir()
    capsys.readouterr()
    assert words in refused(capsys, "from-hf", damaged(tmp_path, name), tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "params"])
def test_half_a_model_folder_is_no_model(folders, tmp_path, capsys, name):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).symlink_to(folders / "model" / name)
    assert "holds no model" in refused(capsys, "to-hf", tmp_path / "model", tmp_path / "hf")
