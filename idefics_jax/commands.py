"""How every command starts and ends: flags, the config file, one-line errors, exit codes."""

import contextlib
import difflib
import errno
import importlib.util
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from idefics_jax import processes
from idefics_jax.errors import UserError

flags.disclaim_key_flags()  # --help shows a flag with the command that defines it by a function here

USAGE_ERROR = 2
INTERRUPTED = 128 + 2  # as shells count what SIGINT ends
# The variable that says with which status a run ends that a signal has stopped; 0 without it.
STOPPED_STATUS = "IDEFICS_STOPPED_STATUS"
# What is wrong with a place, not with the program: full, over quota, read-only, forbidden, too large a file.
PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR)


def run(main: Callable[..., None], *, required: tuple[str, ...] = (), takes_command: bool = False) -> None:
    """Parses the command line, calls `main`, and turns a UserError into one line and exit status 2.

    Args:
      main: the command; it reads its flags from `flags.FLAGS`.
      required: flags that must be given.
      takes_command: whether another command must follow the flags, after `--`; `main` gets its words as a list.
    """
    try:
        rest = _parse(sys.argv, required, takes_command)
        main(*([rest] if takes_command else []))
    except UserError as error:
        processes.hold_back(error)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        processes.leave(USAGE_ERROR)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        processes.leave(1)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # Python's own way out would end threads of JAX in the middle of compiling
    except Exception as error:
        if isinstance(error, OSError) and error.errno in PLACE_ERRORS:
            processes.hold_back(error)
            where = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            print(f"error: {where}; free some space or choose another folder", file=sys.stderr)
            processes.leave(USAGE_ERROR)
        if not processes.several():
            raise
        processes.hold_back(error)
        traceback.print_exc()
        processes.leave(1)
    except SystemExit as error:
        processes.leave(error.code)


def local(command: list[str]) -> list[str]:
    """Returns the words of a command as this machine runs them; raises UserError if there is no such program."""
    if command[0] == "python":  # the one that runs this, also where no environment is activated
        return [sys.executable, *command[1:]]
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no program {command[0]!r}; write the command as in a shell, as python -m MODULE")
    return command


def end_stopped() -> None:
    """Ends a command that a signal has stopped before it was done, with the status that the environment asks for.

    Whatever starts again what has failed, as GKE does, would else take it for one that is done.
    """
    given = os.environ.get(STOPPED_STATUS, "0")
    if not given.isdigit() or int(given) > 255:
        raise UserError(f"{STOPPED_STATUS} is {given!r}; it must be a whole number from 0 to 255")
    sys.exit(int(given))


def _parse(argv: list[str], required: tuple[str, ...], takes_command: bool) -> list[str]:
    """Sets the flags, and returns the words after `--` where a command may stand there."""
    end = argv.index("--") if takes_command and "--" in argv else len(argv)
    own, rest = argv[:end], argv[end + 1 :]
    if any(argument in ("-h", "--help", "--helpfull") for argument in own[1:]):
        print(sys.modules["__main__"].__doc__)
        print(flags.FLAGS.main_module_help())
        sys.exit(0)
    with _flag_errors():
        left = flags.FLAGS(own)
    if len(left) > 1:
        where = ", or the command after --" if takes_command else ""
        raise UserError(f"argument {left[1]!r} belongs to no flag; write it as --name=value{where}")
    for name in required:
        if flags.FLAGS[name].value is None:
            raise UserError(f"--{name} is missing; see --help")
    if takes_command and not rest:
        raise UserError("no command is given; write it after --, as in: -- python -m idefics_jax.train --config FILE")
    return rest


@contextlib.contextmanager
def _flag_errors(where: str = "") -> Iterator[None]:
    """Turns what parsing flags raises into a UserError; `where` stands before what is said of an override's name."""
    try:
        yield
    except (ArithmeticError, AttributeError, ImportError, LookupError, NameError, SyntaxError, TypeError) as error:
        # ml_collections reports a misspelt override by what its look-up raised.
        if isinstance(error, AttributeError) and error.args and isinstance(error.args[0], KeyError):
            error = error.args[0]
        said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        if re.match(r"'[^']*'(\n|$)", said):
            name, _, hint = said.partition("\n")
            hint = f" ({hint})" if hint else ""
            raise UserError(f"{where}the config has no setting {name}; correct the override{hint}") from error
        raise UserError(f"{where}an override of the config is wrong: {said}") from error
    except (flags.Error, ValueError) as error:
        raise UserError(str(error)) from error


def call(path: str, function: str, *arguments: str) -> Any:
    """Runs a config file, which is a program, and returns what a function of it does.

    Raises:
      UserError: there is no such file or function, or either raises.
    """
    if not Path(path).is_file():
        here = sorted(str(p) for p in Path("configs").glob("**/*.py") if p.name != "__init__.py")
        close = difflib.get_close_matches(path, here, 1, cutoff=0.0)
        raise UserError(f"there is no file {path!r}; nearest is {close[0] if close else 'none here'}")
    try:
        spec = importlib.util.spec_from_file_location("config_file", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(f"{path}{where} raises {type(error).__name__}: {error}; mend the config file") from error


class ConfigFile(flags.ArgumentParser):
    """Reads FILE[:argument] into a locked ConfigDict: what the file's `get_config` returns."""

    def parse(self, value: str) -> ConfigDict:
        """Returns the config.

        Raises:
          UserError: see `call`, or `get_config` returns something else.
        """
        path, colon, argument = value.partition(":")
        config = call(path, "get_config", *([argument] if colon else []))
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"get_config returns a {type(config).__name__}; it must return an ml_collections.ConfigDict"
            )
        return config.lock()


def define_config(default: str | None, help_text: str) -> flags.FlagHolder[ConfigDict]:
    """Defines `--config FILE[:argument]` and its `--config.name=value` overrides."""
    return _define_config(default, help_text, flags.FLAGS, sys.argv)


def _define_config(
    default: str | None, help_text: str, values: flags.FlagValues, argv: list[str]
) -> flags.FlagHolder[ConfigDict]:
    holder = config_flags.DEFINE_config_file(
        "config", default, help_text, flag_values=values, lock_config=True, sys_argv=argv
    )
    values["config"].parser = ConfigFile()
    return holder


def read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """Reads a config file as `--config FILE[:argument]` and `--config.NAME=VALUE` do.

    Args:
      path: the file.
      overrides: each NAME=VALUE.

    Raises:
      UserError: see `ConfigFile`, or an override is not of this form, names no setting or has a value of another type.
    """
    for override in overrides:
        if not override.partition("=")[1]:
            raise UserError(f"the override {override!r} sets nothing; write it as NAME=VALUE")
    argv = ["", f"--config={path}", *(f"--config.{override}" for override in overrides)]
    values = flags.FlagValues()
    holder = _define_config(None, "", values, argv)
    with _flag_errors(f"{path}: "):
        values(argv)
    return holder.value


class _Folder(flags.ArgumentParser):
    def parse(self, value: str) -> str:
        if not value:
            raise ValueError("it is empty; give a folder")
        return value


def define_tensor() -> flags.FlagHolder[int]:
    """Defines the flag for how many devices a model is cut over that only runs."""
    return flags.DEFINE_integer("tensor", 1, "devices of this machine that each layer is cut over", lower_bound=1)


def define_folder(name: str, default: str | None, help_text: str) -> flags.FlagHolder[str]:
    """Defines a flag for a folder; an empty one, which would be the current folder, is refused."""
    return flags.DEFINE(_Folder(), name, default, help_text)
