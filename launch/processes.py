"""Runs a command as several processes on this machine, as a pod runs it on several machines.

    python -m launch.processes -n 2 --devices 4 -- python -m idefics_jax.train --config configs/digits.py --workdir DIR

Each has its own devices of the host's CPU, and they exchange numbers over gloo; idefics_jax/processes.py says how they
find each other. Every line they print is led by the number of its process. Ctrl-C or SIGTERM is passed on, so that all
of them save and stop at the same step; a second one ends them. When one dies or is stopped, it is named and the others,
which would wait for it, are ended. One that waits for something of its own, such as a disk, is waited for.
"""

import collections
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from absl import flags

from idefics_jax import commands, processes

_COUNT = flags.DEFINE_integer("processes", 2, "how many processes", lower_bound=1, short_name="n")
_DEVICES = flags.DEFINE_integer("devices", 1, "devices of each", lower_bound=1)

# How long a process may be stopped. Below JAX's heartbeats, which end the others each on its own, with a stack.
STOPPED_SECONDS = 5.0
# What goes to stderr is held back for so long: if a process dies in this time, what the others said to it is dropped.
_HELD_SECONDS = 0.3
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 0.5  # from one look for stopped processes to the next


@dataclasses.dataclass(frozen=True)
class Lost:
    """The process that the end of a group follows from.

    Attributes:
      index: its number.
      sentence: what happened to it.
      status: what the launcher exits with.
    """

    index: int
    sentence: str
    status: int


class Group:
    """Processes that run one command together, and end together."""

    def __init__(self, command: list[str], *, count: int, devices: int):
        """Starts them.

        Args:
          command: program and arguments.
          count: how many processes.
          devices: of the host's CPU, for each.
        """
        address = f"127.0.0.1:{free_port()}"
        self._members: list[subprocess.Popen] = []
        self._stopped: dict[int, float] = {}  # since when
        self._readers: list[threading.Thread] = []
        self._errors: collections.deque[tuple[float, int, str]] = collections.deque()
        for index in range(count):
            member = subprocess.Popen(
                command,
                env={**os.environ, **environment(address, count=count, index=index, devices=devices)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C comes from here alone
            )
            self._members.append(member)
            for read, source in ((_pass_on, member.stdout), (self._hold_back, member.stderr)):
                reader = threading.Thread(target=read, args=(source, index), daemon=True)
                reader.start()
                self._readers.append(reader)

    def wait(self, received: list[int]) -> Lost | None:
        """Waits until all have ended well, or one is lost, which it returns.

        Args:
          received: signals, as they come in. The first is passed on, a second kills.
        """
        passed, looked = 0, time.monotonic()
        while True:
            if len(received) > passed:
                passed += 1
                self._signal(signal.SIGTERM if passed == 1 else signal.SIGKILL)
            ended = [member.poll() for member in self._members]
            if any(ended):
                # The others may have met its death in the same moment.
                index = min(range(len(ended)), key=lambda i: _blame(ended[i]))
                return Lost(index, self._named(index, _how(ended[index])), _status(ended[index]))
            if None not in ended:
                return None
            self._tell_errors(before=time.monotonic() - _HELD_SECONDS)
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                for index in range(len(self._members)):
                    if self._is_stopped(index):
                        return Lost(index, self._named(index, "is stopped"), 1)
            time.sleep(_POLL_SECONDS)

    def end(self, lost: Lost | None) -> None:
        """Ends what still runs, and returns once what they printed has been passed on."""
        self._signal(signal.SIGKILL)
        for member in self._members:
            member.wait()
        for reader in self._readers:
            reader.join(timeout=1.0)
        self._tell_errors(before=time.monotonic(), only=None if lost is None else lost.index)

    def _is_stopped(self, index: int) -> bool:
        """Whether a process, or one that it started, has been stopped for as long as is waited for it.

        By SIGSTOP, or a debugger. A command may be a shell's, whose child is the one that the others wait for.
        """
        if not any(_state(pid) == "T" for pid in _family(self._members[index].pid)):
            self._stopped.pop(index, None)
            return False
        return time.monotonic() - self._stopped.setdefault(index, time.monotonic()) > STOPPED_SECONDS

    def _named(self, index: int, how: str) -> str:
        others = "; the others were ended" if len(self._members) > 1 else ""
        return f"process {index} of {len(self._members)} (pid {self._members[index].pid}) {how}{others}"

    def _signal(self, number: int) -> None:
        for member in self._members:
            if member.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(member.pid, number)

    def _hold_back(self, source: IO[bytes], index: int) -> None:
        for line in source:
            self._errors.append((time.monotonic(), index, _led(line, index)))

    def _tell_errors(self, *, before: float, only: int | None = None) -> None:
        while self._errors and self._errors[0][0] <= before:
            _, index, line = self._errors.popleft()
            if only in (None, index):
                sys.stderr.write(line)
        sys.stderr.flush()


def environment(address: str, *, count: int, index: int, devices: int) -> dict[str, str]:
    """Returns what makes a process one of a group on this machine's CPU."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # not the network: whoever reaches it may speak to it
        "PYTHONUNBUFFERED": "1",
        processes.ADDRESS: address,
        processes.COUNT: str(count),
        processes.INDEX: str(index),
    }


def free_port() -> int:
    """Returns a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _family(pid: int) -> Iterator[int]:
    """Yields a process, the ones that it started, and theirs, as far as Linux tells."""
    yield pid
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended
            for child in thread.read_text().split():
                yield from _family(int(child))


def _state(pid: int) -> str:
    """Returns the letter of a process's state, T if it is stopped; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _pass_on(source: IO[bytes], index: int) -> None:
    for line in source:
        sys.stdout.write(_led(line, index))
        sys.stdout.flush()


def _led(line: bytes, index: int) -> str:
    return f"[{index}] " + line.decode(errors="replace").rstrip("\n") + "\n"


def _blame(returncode: int | None) -> int:
    """Orders how processes have ended: the end of the later ones may follow from that of the first."""
    if returncode is None:
        return 4
    number = _signal_of(returncode)
    if number:
        return 3 if number == signal.SIGABRT else 0  # JAX aborts those who have lost another
    return 2 if returncode else 1


def _signal_of(returncode: int) -> int:
    """Returns the signal that ended a process, or one of a shell's that it stands for; 0 if none did."""
    if returncode < 0:
        return -returncode
    return returncode - 128 if returncode - 128 in set(signal.Signals) else 0


def _how(returncode: int) -> str:
    if _signal_of(returncode):
        return f"was ended by {signal.Signals(_signal_of(returncode)).name}"
    return f"ended with status {returncode}" + ("" if returncode else " before the others")


def _status(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode or 1


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields a list that SIGTERM and Ctrl-C are put into."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(command: list[str], *, count: int, devices: int) -> int:
    """Runs a command as a group of processes and returns the exit status; says on stderr which process was lost."""
    with _signals() as received:
        group, lost = Group(command, count=count, devices=devices), None
        try:
            lost = group.wait(received)
        finally:
            group.end(lost)
    if lost is None:
        return 0
    print(f"error: {lost.sentence}", file=sys.stderr)
    return lost.status


def main(command: list[str]) -> None:
    sys.exit(run(commands.local(command), count=_COUNT.value, devices=_DEVICES.value))


if __name__ == "__main__":
    commands.run(main, takes_command=True)
