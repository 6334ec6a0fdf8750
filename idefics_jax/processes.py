"""Several processes as one run: how one joins the others, what they tell each other, and how it leaves.

A run on a TPU pod is one process a machine. Each finds the others by what JAX detects there, or else by what the
environment says (launch/processes.py sets it for processes on this machine):

    JAX_COORDINATOR_ADDRESS         host:port of process 0
    JAX_NUM_PROCESSES               how many there are
    JAX_PROCESS_ID                  which of them this one is, from 0
    JAX_HEARTBEAT_TIMEOUT_SECONDS   silence after which a process counts as dead, 10 if it is not set

Nothing here imports jax before it is needed: a wrong flag is answered at once.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from idefics_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = "JAX_HEARTBEAT_TIMEOUT_SECONDS"
# JAX's own 100 would leave the others waiting a minute and a half for one that is gone.
_HEARTBEAT_SECONDS = 10
_HOLD_BACK_SECONDS = 0.5
# Words of errors that may be of communication, and how long after a silence is too long JAX may say so.
_BETWEEN_PROCESSES = ("UNKNOWN:", "UNAVAILABLE:", "DEADLINE_EXCEEDED:", "Gloo")
_HEARTBEAT_DELAY_SECONDS = 3.0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes of the run, if there are any; must come before anything else that JAX does.

    Inside, only the first process speaks: what the others print is dropped, their errors are not. Left orderly, it
    waits for the others to leave too.

    Raises:
      UserError: the environment says half of what it must, or the others cannot be reached.
    """
    import jax

    _initialize()
    if not several():
        yield
        return
    with _only_voice(heard=first()):
        yield
        wait_for_all("end of the run")
        jax.distributed.shutdown()


@contextlib.contextmanager
def _only_voice(*, heard: bool) -> Iterator[None]:
    """Lets Python alone print to stdout, and that only where it is `heard`: gloo tells there of each of its sockets."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as voice, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            with contextlib.redirect_stdout(voice if heard else nowhere):
                yield
        finally:
            voice.flush()
            os.dup2(voice.fileno(), 1)


def _initialize() -> None:
    import jax

    given = {name: os.environ.get(name) for name in (ADDRESS, COUNT, INDEX)}
    seconds = _heartbeat_seconds()
    if given[COUNT] is None and given[INDEX] is None:
        # Detects a TPU pod, Slurm or Open MPI; nothing is asked for where there is none of them.
        with contextlib.suppress(_Alone):
            _connect(heartbeat_timeout_seconds=seconds)
    else:
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise UserError(f"{missing[0]} is not set; {ADDRESS}, {COUNT} and {INDEX} go together")
        count = _number(COUNT, given[COUNT], least=1)
        index = _number(INDEX, given[INDEX], least=0)
        if index >= count:
            raise UserError(f"{INDEX} is {index} and {COUNT} {count}; processes are counted from 0")
        if count == 1:
            return
        _connect(
            coordinator_address=given[ADDRESS],
            num_processes=count,
            process_id=index,
            heartbeat_timeout_seconds=seconds,
        )
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this is one machine of {jax.process_count()}, and how to reach the others was not detected; set "
            f"{ADDRESS}, {COUNT} and {INDEX}"
        )


def _heartbeat_seconds() -> int:
    return _number(HEARTBEAT, os.environ.get(HEARTBEAT, str(_HEARTBEAT_SECONDS)), least=1)


class _Alone(Exception):
    """No other process was detected."""


def _connect(**settings: Any) -> None:
    import jax

    try:
        # Who leaves early is not waited for longer than who falls silent.
        jax.distributed.initialize(shutdown_timeout_seconds=settings["heartbeat_timeout_seconds"], **settings)
    except ValueError as error:
        if "coordinator_address" in settings:
            raise
        raise _Alone from error
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"the other processes could not be reached within five minutes ({str(error).splitlines()[0]}); see that "
            f"all of them were started and that {os.environ.get(ADDRESS, 'the first machine')} is open to them"
        ) from error


def _number(name: str, value: str, *, least: int) -> int:
    if not value.isdigit() or int(value) < least:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return int(value)


def several() -> bool:
    """Whether this process has joined others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that speaks and writes the run's own files."""
    import jax

    return jax.process_index() == 0


def hold_back(error: Exception) -> None:
    """Waits before an error is told, the first process shortly and the others longer.

    So what all meet is told once, and what follows from another's death not at all: launch/processes.py has ended
    this process by then. Without it JAX's heartbeats do, which alone know who is dead: what may be a failure of
    communication waits for them.
    """
    if not several():
        return
    import jax

    # What passes between processes alone raises it as ValueError.
    if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and any(
        it in str(error) for it in _BETWEEN_PROCESSES
    ):
        time.sleep(_heartbeat_seconds() + _HEARTBEAT_DELAY_SECONDS)
    time.sleep(_HOLD_BACK_SECONDS if first() else 3 * _HOLD_BACK_SECONDS)


def leave(status: int | str | None) -> None:
    """Ends this process early, as sys.exit does.

    Python's own way out would wait in JAX for the others, and they wait for this one.
    """
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))
    sys.exit(status)


def wait_for_all(what: str) -> None:
    """Returns once every process is here; `what` is the same in all of them."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def from_all(value: Any) -> list[Any]:
    """Returns plain JSON from every process, in their order; all of them call it together."""
    if not several():
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    said = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(said.size)).reshape(-1)
    # Few sizes, for each is a program of its own.
    room = 1 << int(sizes.max() - 1).bit_length()
    rows = multihost_utils.process_allgather(np.pad(said, (0, room - said.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def by_all(attempt: Callable[[], Any]) -> Any:
    """Returns what `attempt` does, or raises in every process what it raised in any; all of them call it together.

    Raises:
      UserError: it did in one of them.
      Exception: its own, or a RuntimeError that says what another process met.
    """
    result = error = None
    try:
        result = attempt()
    except Exception as raised:
        error = raised
    failed = [said for said in from_all(error and [isinstance(error, UserError), str(error)]) if said]
    if error is not None:
        raise error
    if failed:
        of_user, message = failed[0]
        raise (UserError if of_user else RuntimeError)(message)
    return result


def fetch(tree: Any) -> Any:
    """Returns a tree of arrays whole, as numpy, also of those that lie on several processes' devices in parts."""
    import jax
    from jax.experimental import multihost_utils

    if not several():
        return jax.device_get(tree)
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
