"""How every command starts and ends: flags, the config file, one-line errors, exit codes."""

import difflib
import errno
import os
import sys
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
    _check_config_file(argv)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(str(error)) from error
    except (ArithmeticError, AttributeError, ImportError, LookupError, NameError, SyntaxError, TypeError) as error:
        # The config file is a program, and ml_collections reports a misspelt override by what its look-up raised.
        said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        raise UserError(f"the config or an override of it is wrong: {said}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    if len(rest) > 1:
        raise UserError(f"argument {rest[1]!r} belongs to no flag; write it as --name=value")
    for name in required:
        if flags.FLAGS[name].value is None:
            raise UserError(f"--{name} is missing; see --help")


def _check_config_file(argv: list[str]) -> None:
    """Refuses a config file that does not exist: ml_collections accepts it and fails wherever it is first read."""
    for before, argument in zip(argv, argv[1:], strict=False):
        name, _, value = argument.lstrip("-").partition("=")
        if name != "config" or not argument.startswith("-"):
            name, value = before.lstrip("-"), argument
            if name != "config" or not before.startswith("-"):
                continue
        elif not value:
            continue
        path = Path(value.partition(":")[0])
        if not path.is_file():
            here = sorted(str(p) for p in Path("configs").glob("**/*.py") if p.name != "__init__.py")
            close = difflib.get_close_matches(str(path), here, 1, cutoff=0.0)
            raise UserError(
                f"--config: there is no file {str(path)!r}; nearest is {close[0] if close else 'none here'}"
            )


def define_config(default: str | None, help_text: str) -> flags.FlagHolder[ConfigDict]:
    """Defines `--config FILE[:argument]` and its `--config.name=value` overrides."""
    return config_flags.DEFINE_config_file("config", default, help_text, lock_config=True)
