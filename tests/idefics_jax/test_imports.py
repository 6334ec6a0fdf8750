"""What may import what: Flax is fenced in, the reference's libraries stay out, arrows point one way."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("idefics_jax", "data_pipelines", "launch", "configs")
FLAX = ("layers", "attention", "stack", "models", "sharding")


def sources(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
    """Dotted names of the modules a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def offenders(paths: list[pathlib.Path], *forbidden: str) -> list[str]:
    """Files that import one of the modules `forbidden` or anything inside it."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in sorted(imported(path))
        if any(name == module or name.startswith(f"{module}.") for module in forbidden)
    ]


def test_flax_is_imported_by_the_model_alone():
    inside = {ROOT / "idefics_jax" / f"{name}.py" for name in FLAX} | set((ROOT / "idefics_jax/models").rglob("*.py"))
    outside = [path for package in PACKAGES for path in sources(package) if path not in inside]
    assert len(outside) > 20
    assert not offenders(outside, "flax")


def test_the_model_knows_nothing_of_data_training_or_commands():
    model = [ROOT / "idefics_jax" / f"{name}.py" for name in ("config", "layers", "attention", "stack", "sharding")]
    model += sources("idefics_jax/models")
    later = ("training", "convert", "evaluation", "param_transforms", "processor", "tokenizer", "images")
    assert not offenders(model, "data_pipelines", "launch", "configs", *(f"idefics_jax.{name}" for name in later))


def test_data_pipelines_know_nothing_of_the_model():
    forbidden = [f"idefics_jax.{name}" for name in (*FLAX, "config", "training", "convert", "inference", "model")]
    assert not offenders(sources("data_pipelines"), *forbidden)
    shared = [
        ROOT / "idefics_jax" / f"{name}.py" for name in ("documents", "batch", "images", "tokenizer", "processor")
    ]
    assert not offenders(shared, "data_pipelines", *forbidden)


# As where only requirements.txt is installed. Commands define flags of the same names, so each one's are forgotten.
IMPORT_ALL = """
import importlib, sys
from absl import flags

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "tensorflow", "peft"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
for name in sys.argv[1:]:
    before = set(flags.FLAGS)
    importlib.import_module(name)
    for flag in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, flag)
"""


def test_everything_imports_without_the_reference_and_without_tensorflow():
    files = [path for package in ("idefics_jax", "data_pipelines", "launch") for path in sources(package)]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if path.stem[0] != "_"]
    command = [sys.executable, "-c", IMPORT_ALL, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_compare_reaches_for_the_reference_and_only_when_asked():
    files = [path for package in PACKAGES for path in sources(package)]
    reaching = {line.split()[0] for line in offenders(files, "torch", "transformers", "tensorflow", "peft")}
    assert reaching <= {"idefics_jax/convert/compare.py"}
