"""launch/README.md says what the code does: its commands run with --dry-run, its tables are the code's."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs.idefics2_8b import chat, instruct, stage1, stage2
from data_pipelines import filters, prepare
from launch.job import ENVIRONMENT
from launch.slices import SLICES
from tests.launch.gcloud import unknown_flags

FOLDER = Path(__file__).parents[2] / "launch"
TEXT = (FOLDER / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
LINES = [line.strip() for block in BLOCKS for line in re.sub(r"\\\n\s*", "", block).splitlines()]


def variables():
    """Returns what the README's own exports set."""
    words = [word for line in LINES if line.startswith("export ") for word in line.split()[1:]]
    return dict(word.split("=", 1) for word in words if "=" in word and "$(" not in word)


def words(line):
    expanded = re.sub(r"\$(\w+)", lambda name: variables().get(name[1], "1234"), line)
    return shlex.split(expanded)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("gcloud ")])
def test_gcloud_takes_every_flag(line):
    assert unknown_flags(words(line)) == []


def test_there_are_commands_of_every_step():
    assert len([line for line in LINES if line.startswith("gcloud ")]) > 15
    assert sum("launch.tpu_vm" in line for line in LINES) == 1
    assert sum("launch.gke" in line for line in LINES) == 2


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python -m launch.")])
def test_commands_of_ours_run_dry(line):
    given = words(line)
    if given[2] == "launch.processes":
        given = given[given.index("--") + 1 :]
        assert importlib.util.find_spec(given[2])
        return
    end = given.index("--") if "--" in given else len(given)
    command = [sys.executable, *given[1:end], "--dry-run", *given[end:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stderr
    assert "my-project-idefics" in done.stdout or given[2] == "launch.sweep"


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python -m ")])
def test_modules_and_configs_of_commands_are_there(line):
    given = words(line)
    assert importlib.util.find_spec(given[2]), given[2]
    for config in re.findall(r"configs/[\w/]+\.py", line):
        assert (FOLDER.parent / config).exists(), config


@pytest.mark.parametrize("line", [line for line in LINES if "data_pipelines.prepare " in line])
def test_preparation_takes_every_option(line):
    given = words(line)[3:]
    asked = prepare._parser().parse_args(given)
    for name in filters.parse(asked.filters).named:
        assert name in given[given.index("--filters") + 1]


@pytest.mark.parametrize("recipe", [stage1, stage2, instruct, chat])
def test_the_recipes_look_for_what_is_prepared(recipe):
    lines = [words(line)[3:] for line in LINES if "data_pipelines.prepare " in line]
    prepared = {str(prepare._parser().parse_args(line).output) for line in lines}
    for stage in recipe.get_config().data.stages.values():
        for path in (Path(path) for source in stage.sources.values() for path in source.paths):
            assert {str(path), str(path.parent / "1234")} & prepared, path  # `words` writes $set so
            assert path.parent.name != "data" or path.name in TEXT


def test_the_table_of_slices_is_the_code_s():
    told = re.findall(r"^\| (v\S+) \| (\S+) \| (\S+), (\S+), (\d+) \|$", TEXT, re.M)
    assert sorted(told) == sorted(
        (name, one.accelerator_type, one.machine_type, one.topology, str(one.hosts)) for name, one in SLICES.items()
    )


def test_the_launchers_variables_are_told():
    for name, value in ENVIRONMENT.items():
        if name != "PYTHONUNBUFFERED":
            assert re.search(rf"^\| `{name}` \| the launchers: `?{value}`? \|", TEXT, re.M), name


def test_the_image_holds_the_whole_program():
    copied = re.findall(r"^COPY (\S+) (\S+)$", (FOLDER / "Dockerfile").read_text(), re.M)
    packages = {path.parent.name for path in FOLDER.parent.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages <= {source for source, target in copied if source == target}
    named = re.search(r"^COPY (.*requirements.*) \./$", (FOLDER / "Dockerfile").read_text(), re.M)
    assert all((FOLDER.parent / file).exists() for file in named[1].split())
