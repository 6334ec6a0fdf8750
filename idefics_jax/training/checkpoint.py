"""Checkpoints of a run: the state, the data's position and a fingerprint, written by Orbax in the background.

    workdir/checkpoints/<step>/{state, data, meta}     newest `keep` steps, and one from before a doubt
    workdir/frozen/                                    frozen parameters, once; every step's meta has their fingerprint

A restore takes the newest step whose fingerprint is right, onto whatever mesh is current; a damaged step is set
aside as `<step>.damaged`, never deleted.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from idefics_jax import full_disk, processes
from idefics_jax.errors import UserError
from idefics_jax.fingerprint import changed, fingerprint
from idefics_jax.training.data_position import RestorePosition, SavePosition


@dataclasses.dataclass
class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest checkpoints, and the last of the first `sound` steps where that is a number."""

    newest: int
    sound: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint, oldest first, whether it is kept."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        before = [step for step in steps if self.sound is not None and step <= self.sound]
        return [step in (*steps[-self.newest :], *before[-1:]) for step in steps]


class _Stopping(logging.Filter):
    """Drops what Orbax says, several times in every process, of a stop that the loop has agreed on and tells of."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Reached preemption sync point" not in record.getMessage()


_STOPPING = _Stopping()


class Checkpoints:
    """The checkpoints under `workdir`, and the frozen parameters beside them."""

    def __init__(self, workdir: epath.Path, *, keep: int):
        self.path = workdir / "checkpoints"
        self._frozen_path = workdir / "frozen"
        self._frozen: dict[str, int] = {}  # their fingerprint
        self._kept = _Kept(keep)
        full_disk.say_once()
        absl_logging.get_absl_logger().addFilter(_STOPPING)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        with _saying_what_failed(self.path, self.latest_step):
            options = ocp.CheckpointManagerOptions(preservation_policy=self._kept, cleanup_tmp_directories=True)
            return ocp.CheckpointManager(self.path, options=options)

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first."""
        return (
            sorted(int(path.name) for path in self.path.iterdir() if path.name.isdigit()) if self.path.exists() else []
        )

    def latest_step(self) -> int | None:
        """Returns the newest committed step, or None."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: Any, data: grain.DatasetIterator, progress: dict[str, Any], *, sound: int | None
    ) -> None:
        """Starts saving a step; returns once the arrays are copied. A step that is already there is left alone.

        Args:
          step: its number.
          state: arrays.
          data: iterator, for its position.
          progress: what the run says about itself (progress.Progress.state), plain JSON.
          sound: the newest checkpoint of up to so many steps is kept beside the newest of all; None where nothing is
            in doubt.
        """
        if step == self._manager.latest_step():  # one that is still being written among them
            return
        full_disk.check_room(self.path, state)
        self._kept.sound = sound
        with _saying_what_failed(self.path, self.latest_step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=SavePosition(data),
                    meta=ocp.args.JsonSave(
                        {"fingerprint": fingerprint(state), "frozen": self._frozen, "progress": progress}
                    ),
                ),
            )

    def restore(self, abstract_state: Any, data: grain.DatasetIterator) -> tuple[Any, dict[str, Any]] | None:
        """Restores the newest intact step and sets the data's position.

        Args:
          abstract_state: ShapeDtypeStructs with the shardings wanted.
          data: iterator, set in place.

        Returns:
          The state and the progress as they were saved, or None where there is no checkpoint.

        Raises:
          UserError: there are checkpoints, and none is intact; or the data is not that of the checkpoint.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self._read(step, abstract_state, data)
            except UserError:  # the checkpoint is whole, what it belongs to has changed
                raise
            except Exception as error:  # damage shows as nearly any exception of Orbax or tensorstore
                absl_logging.warning("checkpoint %d is damaged: %s", step, str(error).splitlines()[0])
                self._set_aside(step)
            else:
                return restored
        if steps:
            raise UserError(f"none of the checkpoints {steps} in {self.path} is intact; start again in another workdir")
        return None

    def save_frozen(self, frozen: Any) -> None:
        """Saves the frozen parameters of a new run, in the place of those that an earlier one left."""
        if not frozen:
            return
        self._frozen = fingerprint(frozen)
        with _saying_what_failed(self._frozen_path, lambda: None), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self._frozen_path, frozen, force=True)

    def load_frozen(self, abstract_frozen: Any) -> Any:
        """Restores what `save_frozen` wrote, onto the shardings of `abstract_frozen`; after `restore`.

        Raises:
          UserError: they are not those of the checkpoint that was restored.
        """
        if not abstract_frozen:
            return {}
        path = self._frozen_path
        with ocp.StandardCheckpointer() as checkpointer:
            frozen = checkpointer.restore(path, abstract_frozen)
        damaged = changed(frozen, self._frozen)
        if damaged:
            raise UserError(
                f"{path} is damaged, or of another run: {damaged[0]} and {len(damaged) - 1} more leaves are not what "
                "was saved; put the folder back from a copy, or start again in another workdir"
            )
        return frozen

    def _read(self, step: int, abstract_state: Any, data: grain.DatasetIterator) -> tuple[Any, dict[str, Any]]:
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore())
        restored = processes.by_all(lambda: self._manager.restore(step, args=wanted))
        damaged = changed(restored.state, restored.meta["fingerprint"])
        if damaged:
            raise ValueError(f"{damaged[0]} and {len(damaged) - 1} more leaves are not what was saved")
        where = ocp.args.Composite(data=RestorePosition(data))
        processes.by_all(lambda: self._manager.restore(step, args=where))
        self._frozen = restored.meta["frozen"]
        return restored.state, restored.meta["progress"]

    def _set_aside(self, step: int) -> None:
        self._manager.close()
        processes.wait_for_all(f"{step} is read by nobody")
        if processes.first():
            (self.path / str(step)).rename(self.path / f"{step}.damaged")
        processes.wait_for_all(f"{step} is set aside")
        self._manager = self._open()

    def wait(self) -> None:
        """Returns once every save has been committed, or raises what stopped it."""
        with _saying_what_failed(self.path, self.latest_step):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Returns the shapes as ShapeDtypeStructs that say where each leaf is to lie."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


@contextlib.contextmanager
def _saying_what_failed(path: epath.Path, latest_step: Callable[[], int | None]) -> Iterator[None]:
    """Turns a failure to write into a sentence. Orbax reports a full disk at the next save or wait."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        why = full_disk.refused(error)
        if why is None:
            raise
        last = latest_step()
        raise UserError(
            f"{path} cannot be written ({why}); make room for it and run the same command again: it goes on "
            f"from {'the start' if last is None else f'step {last}'}"
        ) from error
