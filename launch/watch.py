"""Runs a command as one machine's process of a run, and says in a sentence which other one it has lost.

    python -m launch.watch -- python -m idefics_jax.train --config FILE --workdir DIR

JAX's heartbeats end a process that has lost another with a report of JAX's own code and a stack, in which the number of
the lost one is a line. That report is held back here and told as a sentence, with exit status 1; all else that is
printed, signals and the exit status are passed on as they are. launch.gke and launch.tpu_vm start every machine's
process so; where one launcher owns all processes, as launch.processes does, it names the lost one itself.
"""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from idefics_jax import commands, processes

# A line that may begin a report, which is held back until it is known whether the process ends by it, and one that says
# that it does.
_MAY_BEGIN = re.compile(r"[EFW]\d{4} .* (coordination_service\w*|preemption_sync_manager|client)\.\w+:\d+\]")
_ENDS = "Terminating process because the JAX distributed service detected fatal errors"
_SILENT = re.compile(r"stopped sending heartbeats\):\n(?P<tasks>.*?)\n?The tasks have crashed", re.DOTALL)
# How long a report may take from its first line to the one that ends the process, and what follows that.
_HELD_SECONDS, _REST_SECONDS = 3.0, 0.5
LOST_STATUS = 1


class Report:
    """What a process says on stderr, line by line, with what may be JAX's report held back."""

    def __init__(self):
        self._held: list[str] = []
        self._since = 0.0

    def take(self, line: str) -> None:
        """Passes a line on, or holds it back."""
        if self._held or _MAY_BEGIN.match(line):
            self._since = self._since if self._held else time.monotonic()
            self._held.append(line)
        else:
            sys.stderr.write(line)
            sys.stderr.flush()

    def tell(self) -> None:
        """Passes on what is held back."""
        sys.stderr.write("".join(self._held))
        sys.stderr.flush()
        self._held.clear()

    def tell_old(self) -> None:
        """Passes on what has been held back for too long to be a report that ends the process."""
        if self._held and self.lost() is None and time.monotonic() - self._since > _HELD_SECONDS:
            self.tell()

    def lost(self) -> str | None:
        """Returns which process JAX has lost, as a sentence, once it has said that it ends this one for that."""
        said = "".join(self._held)
        if _ENDS not in said:
            return None
        silent = _SILENT.search(said)
        if silent is None:
            return "process 0, through which the others find each other, does not answer"
        numbers = sorted({int(number) for number in re.findall(r"\d+$", silent["tasks"], re.MULTILINE)})
        which = "es " if len(numbers) > 1 else " "
        return f"process{which}{', '.join(map(str, numbers))} sent no heartbeats any more"


def run(command: list[str]) -> int:
    """Runs a command to its end and returns its exit status."""
    received: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.put(number))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process.stderr, lines), daemon=True).start()
    report, line = Report(), ""
    while line is not None:
        while not received.empty():
            os.killpg(process.pid, received.get())
        try:
            line = lines.get(timeout=0.1)
        except queue.Empty:
            report.tell_old()
            continue
        if line is not None:
            report.take(line)
        if report.lost() is not None:
            time.sleep(_REST_SECONDS)
            while not lines.empty():
                report.take(lines.get() or "")
            os.killpg(process.pid, signal.SIGKILL)  # a TPU's library would spend half a minute on its own report
            process.wait()
            return _told(report.lost())
    status = process.wait()
    report.tell()
    return 128 - status if status < 0 else status


def _told(lost: str) -> int:
    index = os.environ.get(processes.INDEX)
    own = "" if index is None else f" {index}"
    print(f"error: {lost}, so this process{own} was ended; see the log of the lost one", file=sys.stderr)
    return LOST_STATUS


def _read(source: IO[bytes], lines: queue.SimpleQueue) -> None:
    for line in source:
        lines.put(line.decode(errors="replace"))
    lines.put(None)


def main(command: list[str]) -> None:
    sys.exit(run(commands.local(command)))


if __name__ == "__main__":
    commands.run(main, takes_command=True)
