"""Units of preparation (units.py) on the processes of this machine.

Processes are spawned, so that none inherits a thread's lock. Each tells of its unit twice a second, so the progress of
a single large input can be seen, and too many bad rows stop the run before their file ends. A process whose parent is
killed ends itself: what it wrote aside is not counted.
"""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipelines.units import Report, Unit, prepare_unit
from idefics_jax.errors import UserError

_TELL_SECONDS = 0.5
_POLL_SECONDS = 0.2
# What a worker was given when it began: the queue to tell by, and the event that stops it.
_worker: dict[str, Any] = {}


class _Stopped(Exception):
    """Ends a unit because the run ends."""


def run(
    units: Sequence[Unit], processes: int, watch: Callable[[Mapping[int, Report], Sequence[int]], None]
) -> list[Report]:
    """Prepares units, and returns their reports in the same order.

    Args:
      units: with their numbers.
      processes: how many work at once.
      watch: told several times a second what became so far of each unit that has begun, by number, and which
        units are done; what it raises ends the run.

    Raises:
      UserError: a unit cannot be done, or a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    queue, stop = context.SimpleQueue(), context.Event()
    reports: dict[int, Report] = {}
    pool = concurrent.futures.ProcessPoolExecutor(min(processes, len(units)), context, _begin, (queue, stop))
    try:
        waiting = {pool.submit(_work, unit): unit.number for unit in units}
        while waiting:
            done, _ = concurrent.futures.wait(waiting, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
            while not queue.empty():
                number, report = queue.get()
                reports[number] = report
            for future in done:
                reports[waiting.pop(future)] = future.result()
            watch(reports, [unit.number for unit in units if unit.number not in waiting.values()])
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a process of the preparation was killed, often because memory ran out; give the same command again with "
            f"fewer than --processes {processes}: it goes on after the last finished input"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return reports


def _begin(queue: Any, stop: Any) -> None:
    _worker.update(queue=queue, stop=stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(unit: Unit) -> Report:
    told = time.monotonic()

    def watch(unit: Unit, report: Report) -> None:
        nonlocal told
        if _worker["stop"].is_set():
            raise _Stopped
        if time.monotonic() - told > _TELL_SECONDS:
            _worker["queue"].put((unit.number, report))
            told = time.monotonic()

    return prepare_unit(unit, watch)
