"""A config file is a program: whatever goes wrong in it is one sentence that says where."""

import subprocess
import sys

import pytest

from idefics_jax.commands import ConfigFile, read_config
from idefics_jax.errors import UserError

GOOD = """
from ml_collections import ConfigDict

def get_config(size="small"):
    return ConfigDict({"size": size})
"""


def test_a_config_file_is_called_with_its_argument_and_locked(tmp_path):
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    config = ConfigFile().parse(str(path))
    assert config.to_dict() == {"size": "small"}
    assert config.is_locked
    assert ConfigFile().parse(f"{path}:large").size == "large"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("def get_config():\n    return open('/nowhere').read()", "line 2 raises FileNotFoundError: .*'/nowhere'"),
        ("import nosuchmodule", "line 1 raises ModuleNotFoundError"),
        ("def get_config():\n    assert False, 'too small'", "line 2 raises AssertionError: too small"),
        ("def get_config(:", r"raises SyntaxError: invalid syntax \(wrong.py, line 1\)"),
        ("def get_config():\n    return {'steps': 1}", "returns a dict; it must return an ml_collections.ConfigDict"),
        ("steps = 1", "has no attribute 'get_config'"),
        ("import sys\nsys.exit(0)", "line 2 raises SystemExit: 0"),
    ],
)
def test_what_goes_wrong_in_a_config_file_is_a_sentence(program, message, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(program)
    with pytest.raises(UserError, match=message):
        ConfigFile().parse(str(path))


def test_a_file_s_own_sentence_is_left_as_it_is():
    with pytest.raises(UserError, match=r"^configs/digits.py:foo is none of full, lora, dora, frozen$"):
        ConfigFile().parse("configs/digits.py:foo")


def test_a_file_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"no file 'configs/digit.py'; nearest is configs/digits.py"):
        ConfigFile().parse("configs/digit.py")


def test_overrides_are_read_as_on_the_command_line(tmp_path):
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    assert read_config(str(path), ["size=large"]).to_dict() == {"size": "large"}
    for override, message in (
        ("colour=red", "good.py: the config has no setting 'colour'; correct the override"),
        ("sizee=1", "good.py: the config has no setting 'sizee'.*Did you mean \"size\""),
        ("size", "'size' sets nothing; write it as NAME=VALUE"),
    ):
        with pytest.raises(UserError, match=message):
            read_config(str(path), [override])


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_an_empty_checkpoint_is_not_the_current_folder(command):
    words = [sys.executable, "-m", f"idefics_jax.{command}", "--checkpoint="]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "it is empty; give a folder" in done.stderr


def test_help_shows_the_flags_that_are_defined_by_a_function_of_commands():
    done = subprocess.run(
        [sys.executable, "-m", "idefics_jax.train", "--help"], capture_output=True, text=True, check=True
    )
    for flag in ("--config:", "--workdir:", "--[no]plan:"):
        assert f"  {flag}" in done.stdout


WRAPPER = """
from absl import flags
from idefics_jax import commands

flags.DEFINE_integer("times", 1, "how often")
commands.run(lambda words: print(flags.FLAGS.times, words), takes_command=True)
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--times=2", "--", "python", "-m", "x", "--help", "--times=3", "--"],) * 2,
        (["--times=2"], "error: no command is given; write it after --, as in: -- python"),
        (["--"], "error: no command is given"),
        (["python", "--", "x"], "error: argument 'python' belongs to no flag"),
    ],
)
def test_a_command_after_two_dashes_is_left_as_it_is(arguments, said):
    done = subprocess.run([sys.executable, "-c", WRAPPER, *arguments], capture_output=True, text=True, check=False)
    if isinstance(said, str):
        assert done.stderr.startswith(said)
    else:
        assert done.stdout == f"2 {arguments[2:]}\n"


def test_ctrl_c_is_a_line_and_the_status_that_shells_know():
    # A shell starts what it puts in the background with the signal ignored, and the tests may be that.
    program = (
        "import signal; from idefics_jax import commands; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "commands.run(lambda: signal.raise_signal(signal.SIGINT))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "stopped by Ctrl-C\n")
