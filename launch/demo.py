"""The whole way in one command, on data that comes with a library: write it, train, evaluate, answer, export.

    python -m launch.demo --workdir work/digits

Each step is a command of its own, printed before it runs, so that it can be run alone.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from data_pipelines.source_config import SourceConfig
from data_pipelines.sources import read_documents
from idefics_jax import commands
from idefics_jax.errors import UserError
from idefics_jax.evaluation.questions import question

DATA = "work/digits-data"
_WORKDIR = commands.define_folder("workdir", "work/digits", "folder of the run")
_QUESTION_ROW = 5


def step(module: str, *arguments: str) -> None:
    """Runs a command of this package, and stops the demo with its exit code if it fails."""
    print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if done.returncode:
        raise UserError(f"python -m {module} failed with exit code {done.returncode}; its message stands above")


def main() -> None:
    started = time.monotonic()
    workdir = _WORKDIR.value
    step("data_pipelines.digits", DATA)
    step("idefics_jax.train", "--config", "configs/digits.py", "--workdir", workdir)
    step("idefics_jax.evaluate", "--checkpoint", workdir, "--config", "configs/eval/digits.py")
    asked = held_out_question(workdir)
    step("idefics_jax.generate", "--checkpoint", workdir, "--image", f"{workdir}/example.png", "--prompt", asked)
    # convert never writes over a folder; this one is the demo's own.
    shutil.rmtree(f"{workdir}/hf", ignore_errors=True)
    step("idefics_jax.convert", "to-hf", workdir, f"{workdir}/hf")
    print(f"\n{result(workdir, time.monotonic() - started)}")


def result(workdir: str, seconds: float) -> str:
    """Returns what the demo ends with: what lies where, and last how well the model reads."""
    figures = json.loads(Path(workdir, "eval", "metrics.json").read_text())
    return (
        f"in {seconds:.0f} s: loss curve {workdir}/loss.png, contact sheet {workdir}/eval/contact_sheet.png, metrics "
        f"{workdir}/eval/metrics.json, Hugging Face folder {workdir}/hf\n"
        f"held-out exact match: {figures['exact_match']:.3f}"
    )


def held_out_question(workdir: str) -> str:
    """Writes one held-out image to `workdir/example.png`, and returns what to ask about it."""
    source = SourceConfig(name="heldout", kind="cauldron", paths=(f"{DATA}/heldout.parquet",))
    questions = [question(document) for document in read_documents(source)]
    chosen = [item for item in questions if len(item.images) == 1][_QUESTION_ROW]
    Path(workdir, "example.png").write_bytes(chosen.images[0])
    return chosen.text.removeprefix("User:").removesuffix("Assistant:").strip()


if __name__ == "__main__":
    commands.run(main)
