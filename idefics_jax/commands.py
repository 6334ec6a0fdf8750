"""How every command starts and ends: flags, the config file, one-line errors, exit codes."""

import difflib
import errno
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from idefics_jax.errors import UserError

USAGE_ERROR = 2
# What is wrong with a place, not with the program: full, over quota, read-only, forbidden, too large a file.
PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR)


def run(main: Callable[[], None], *, required: tuple[str, ...] = ()) -> None:
    """Parses the command line, calls `main`, and turns a UserError into one line and exit status 2.

    Args:
      main: the command; it reads its flags from `flags.FLAGS`.
      required: flags that must be given.
    """
    try:
        _parse(sys.argv, required)
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in PLACE_ERRORS:
            raise
        print(f"error: {error.filename}: {error.strerror}; free some space or choose another folder", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def _parse(argv: list[str], required: tuple[str, ...]) -> None:
    if any(argument in ("-h", "--help", "--helpfull") for argument in argv[1:]):
        print(sys.modules["__main__"].__doc__)
        print(flags.FLAGS.main_module_help())
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(str(error)) from error
    except (ArithmeticError, AttributeError, ImportError, LookupError, NameError, SyntaxError, TypeError) as error:
        # ml_collections reports a misspelt override by what its look-up raised.
        said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        raise UserError(f"an override of the config is wrong: {said}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    if len(rest) > 1:
        raise UserError(f"argument {rest[1]!r} belongs to no flag; write it as --name=value")
    for name in required:
        if flags.FLAGS[name].value is None:
            raise UserError(f"--{name} is missing; see --help")


class ConfigFile(flags.ArgumentParser):
    """Reads FILE[:argument] into a locked ConfigDict. A config file is a program: what it raises becomes a sentence."""

    def parse(self, value: str) -> ConfigDict:
        """Runs the file and returns what its `get_config` does.

        Raises:
          UserError: there is no such file, it has no `get_config`, or that raises or returns something else.
        """
        path, colon, argument = value.partition(":")
        if not Path(path).is_file():
            here = sorted(str(p) for p in Path("configs").glob("**/*.py") if p.name != "__init__.py")
            close = difflib.get_close_matches(path, here, 1, cutoff=0.0)
            raise UserError(f"there is no file {path!r}; nearest is {close[0] if close else 'none here'}")
        try:
            spec = importlib.util.spec_from_file_location("config_file", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            config = module.get_config(*([argument] if colon else []))
        except UserError:
            raise
        except Exception as error:
            lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == path]
            where = f", line {lines[-1]}" if lines else ""
            raise UserError(f"{path}{where} raises {type(error).__name__}: {error}; mend the config file") from error
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"get_config returns a {type(config).__name__}; it must return an ml_collections.ConfigDict"
            )
        return config.lock()


def define_config(default: str | None, help_text: str) -> flags.FlagHolder[ConfigDict]:
    """Defines `--config FILE[:argument]` and its `--config.name=value` overrides."""
    holder = config_flags.DEFINE_config_file("config", default, help_text, lock_config=True)
    flags.FLAGS["config"].parser = ConfigFile()
    return holder
