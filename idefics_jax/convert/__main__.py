"""Weights between Hugging Face's form and ours.

python -m idefics_jax.convert from-hf HF_FOLDER MODEL_FOLDER
python -m idefics_jax.convert to-hf MODEL_FOLDER_OR_WORKDIR HF_FOLDER
python -m idefics_jax.convert to-peft WORKDIR PEFT_FOLDER
python -m idefics_jax.convert from-peft PEFT_FOLDER BASE MODEL_FOLDER
python -m idefics_jax.convert compare HF_FOLDER ANY_MODEL [--image FILE]... [--prompt TEXT] [--dtype bfloat16]
python -m idefics_jax.convert inspect ANY_MODEL
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import logging
from etils import epath

from idefics_jax.config import Idefics2Config
from idefics_jax.convert import peft
from idefics_jax.convert.compare import compare
from idefics_jax.convert.hf import from_hf
from idefics_jax.convert.hf_folder import SHARD_BYTES, HfFolder, read_generation_config, write_hf_folder
from idefics_jax.convert.inspect import describe
from idefics_jax.convert.orbax import is_model_folder, load_model, save_model
from idefics_jax.convert.staging import staged
from idefics_jax.errors import UserError
from idefics_jax.model import ADAPTER_IN_WORKDIR, find_model, load, load_processor

DIFFERS, USAGE_ERROR = 1, 2


def main(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit status."""
    logging.set_verbosity(logging.ERROR)
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m idefics_jax.convert", description="Weights between Hugging Face's form and ours.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, about: str, **places: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        for place, meaning in places.items():
            sub.add_argument(place, help=meaning)
        sub.set_defaults(run=run)
        return sub

    new, trained = "folder to write", "model folder or work directory"
    command("from-hf", _from_hf, "Write a model folder.", source="Hugging Face folder", target=new)
    command("to-hf", _to_hf, "Write a Hugging Face folder.", source=trained, target=new)
    command("to-peft", _to_peft, "Write the adapter of a run.", source="work directory of a run with lora", target=new)
    base = "model it was trained on: Hugging Face folder, model folder or work directory"
    command("from-peft", _from_peft, "Merge an adapter.", source="PEFT folder", base=base, target=new)
    command("inspect", _inspect, "Print a table of the weights.", source="any model")
    sub = command("compare", _compare, "Compare logits with transformers.", hf="Hugging Face folder", ours="any model")
    sub.add_argument("--image", action="append", default=[], help="image file shown before the prompt; may be repeated")
    sub.add_argument("--prompt", help="text; without it and --image, the inputs are random")
    sub.add_argument("--seed", type=int, default=0, help="of the random inputs")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both computations")
    return parser


def _from_hf(options: argparse.Namespace) -> int:
    _on_cpu()
    source, target = find_model(options.source), epath.Path(options.target)
    if is_model_folder(source):
        raise UserError(f"{source} is a model folder already; from-hf reads a Hugging Face folder")
    if target.exists():
        raise UserError(f"{target} is there already; choose another folder, or remove it first")
    config = Idefics2Config.load(source)
    params = from_hf(HfFolder(source), config)
    generation = read_generation_config(source)
    save_model(target, params, config, load_processor(source), generation_config=generation)
    print(f"wrote {target}")
    return 0


def _to_hf(options: argparse.Namespace) -> int:
    _on_cpu()
    source = find_model(options.source)
    if not is_model_folder(source):
        raise UserError(f"{source} is a Hugging Face folder already; to-hf reads a model folder or a work directory")
    params, config = load_model(source)
    write_hf_folder(
        options.target,
        params,
        config,
        load_processor(source),
        generation_config=read_generation_config(source),
        shard_bytes=SHARD_BYTES,
    )
    print(f"wrote {options.target}")
    return 0


def _to_peft(options: argparse.Namespace) -> int:
    source = epath.Path(options.source) / ADAPTER_IN_WORKDIR
    if not source.is_dir():
        raise UserError(
            f"{source} is not there: the run is not finished, has no lora, or trained what PEFT cannot hold, as its "
            "last lines say; to-hf exports the merged model"
        )
    with staged(options.target, replace=False) as folder:
        for name in (peft.CONFIG, peft.WEIGHTS):
            (source / name).copy(folder / name)
    print(peft.about(options.target))
    return 0


def _from_peft(options: argparse.Namespace) -> int:
    _on_cpu()
    base = load(options.base)
    adapter = peft.load_adapter(options.source, base.config)
    if epath.Path(options.target).exists():
        raise UserError(f"{options.target} is there already; choose another folder, or remove it first")
    generation = read_generation_config(find_model(options.base))
    merged = adapter.merge(base.params)
    save_model(options.target, merged, base.config, base.processor, generation_config=generation)
    print(f"wrote {options.target}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    _on_cpu()
    print(describe(options.source))
    return 0


def _compare(options: argparse.Namespace) -> int:
    result = compare(
        options.hf,
        options.ours,
        images=options.image,
        prompt=options.prompt,
        seed=options.seed,
        dtype=options.dtype,
    )
    print(result)
    return 0 if result.agrees else DIFFERS


def _on_cpu() -> None:
    """Keeps a conversion off the accelerator: it needs the host's memory, not arithmetic."""
    jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
