"""The training loop: batches in, steps, progress, checkpoints, and an orderly end whatever ends it."""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
from etils import epath
from jax.experimental import multihost_utils

from data_pipelines import pipeline, position
from data_pipelines.pipeline import DataConfig
from idefics_jax import processes, sharding
from idefics_jax.buckets import write_whole
from idefics_jax.convert.orbax import save_model
from idefics_jax.convert.peft import about, save_adapter
from idefics_jax.errors import UserError
from idefics_jax.model import ADAPTER_IN_WORKDIR
from idefics_jax.param_transforms.partition import combine
from idefics_jax.settings import differences
from idefics_jax.training import suspects
from idefics_jax.training.checkpoint import Checkpoints
from idefics_jax.training.config import FREE_AFTER_STOP, FREE_ON_RESUME, TrainConfig
from idefics_jax.training.curves import draw_curves
from idefics_jax.training.divergence import Stopped
from idefics_jax.training.optimizer import make_schedule
from idefics_jax.training.progress import Progress
from idefics_jax.training.run import Run, assemble, row_share
from idefics_jax.training.summary import SUMMARY_FILE, write_summary
from idefics_jax.training.writers import RunWriter, silent_writer

# The settings of a run, in its work directory.
RUN_FILE = "run.json"
# There too: where the data of the run before it ended, if its own goes on from there.
DATA_START = "data_start"
# Why a run stopped by itself, until it goes on.
STOPPED_FILE = "stopped.txt"


def train(config: TrainConfig, values: dict[str, Any], workdir: epath.Path) -> bool:
    """Trains, or goes on with, the run in `workdir`, and leaves the trained model in `workdir/model`.

    Several processes that have joined (processes.joined) all call it, and do the same at the same step.

    Args:
      config: the settings.
      values: the same as the plain nested dict that is kept beside the run.
      workdir: absolute path, or one in a bucket.

    Returns:
      Whether the run has reached its end; a signal has stopped it if not.

    Raises:
      UserError: the config cannot be used, `workdir` holds another run, a number is not finite, the data is bad
        beyond its limit, or the disk is full.
    """
    check_same_run(values, workdir)
    check_shared(workdir)
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use_mesh(mesh, sharding.RULES[config.sharding]):
        run = assemble(config, mesh)
        share = row_share(mesh, config.data.shape.rows)
        began = with_kept_start(config.data, workdir)
        data = pipeline.batches(began, run.processor, process_index=share.index, process_count=share.count)
        checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
        with contextlib.closing(data), contextlib.closing(checkpoints):
            state, frozen, before = start(run, data, checkpoints, workdir)
            if processes.first():
                record_run(values, workdir)
                keep_start(began, workdir)
            vocabulary = run.plan.sizes.text_config.vocab_size
            progress = Progress(
                config.steps,
                config.diverged_after,
                before,
                vocabulary=vocabulary,
                leads=share.leads,
                workdir=workdir if processes.first() else None,
            )
            state, done = steps(run, state, frozen, progress, data, checkpoints, workdir)
        if done:
            finish(run, state, frozen, data, workdir)
        else:
            print("stopped and saved; run the same command again to go on", flush=True)
        return done


def check_same_run(values: dict[str, Any], workdir: epath.Path) -> None:
    """Compares the settings with those of the run that a work directory holds, if it has left anything of use.

    What a run left that was refused or killed before its first checkpoint binds nobody; the next one writes over it.

    Raises:
      UserError: `workdir` is a file, or settings that change what is learnt differ.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; give a folder, it is made if it is missing")
    path = workdir / RUN_FILE
    held = [*(workdir / "checkpoints").glob("*"), *workdir.glob("model"), *workdir.glob(SUMMARY_FILE)]
    if not held or not path.exists():
        return
    lines = differences(json.loads(path.read_text()), json.loads(json.dumps(values)))
    free = FREE_ON_RESUME + (FREE_AFTER_STOP if (workdir / STOPPED_FILE).exists() else ())
    changed = [line for line in lines if not re.match(rf"({'|'.join(free)})[.:]", line)]
    if changed:
        raise UserError(
            f"{workdir} holds a run with other settings ({'; '.join(changed)}); give them as they were, or choose "
            "another --workdir"
        )


def check_shared(workdir: epath.Path) -> None:
    """Raises UserError where `workdir` is not the same folder to all processes: each machine has disks of its own."""
    if not processes.several():
        return
    mark = workdir / f".seen-{processes.from_all(secrets.token_hex(8))[0]}"
    if processes.first():
        workdir.mkdir(parents=True, exist_ok=True)
        mark.write_text("")
    processes.wait_for_all("mark in the work directory")
    blind = [index for index, seen in enumerate(processes.from_all(mark.exists())) if not seen]
    if processes.first():
        mark.unlink()
    if blind:
        raise UserError(
            f"--workdir {workdir} of process {blind[0]} is not that of process 0; give a folder that all machines "
            "share, as gs://BUCKET/FOLDER"
        )


def with_kept_start(data: DataConfig, workdir: epath.Path) -> DataConfig:
    """Lets a run that was stopped begin its data from its own copy of where the run before had left it."""
    stopped = any((workdir / "checkpoints").glob("*")) and (workdir / DATA_START).exists()
    return dataclasses.replace(data, after=str(workdir / DATA_START)) if data.after and stopped else data


def keep_start(began: DataConfig, workdir: epath.Path) -> None:
    """Keeps beside a run where the run before it had left the data, which may be trained further or be deleted."""
    if began.after and epath.Path(began.after) != workdir / DATA_START:
        position.keep(began.after, workdir / DATA_START)


def record_run(values: dict[str, Any], workdir: epath.Path) -> None:
    """Keeps the settings beside a run, which goes on if it had stopped by itself."""
    write_whole(workdir / RUN_FILE, json.dumps(values, indent=2).encode())
    (workdir / STOPPED_FILE).unlink(missing_ok=True)


def start(
    run: Run, data: grain.DatasetIterator, checkpoints: Checkpoints, workdir: epath.Path
) -> tuple[Any, Any, dict[str, Any] | None]:
    """Prints what trains, and returns what the run goes on from.

    Returns:
      State and frozen parameters, restored, with the data's position, or new; and Progress.state of the stopped run.
    """
    print(f"{run.plan.table}\n\n{run.layout}", flush=True)
    restored = checkpoints.restore(run.abstract_state, data)
    if restored is None:
        state, frozen = run.first_state()
        checkpoints.save_frozen(frozen)
        print(f"new run in {workdir}: {run.config.steps} steps", flush=True)
        return state, frozen, None
    state, before = restored
    print(f"resumed after step {int(state['step'])} from {checkpoints.path}", flush=True)
    return state, checkpoints.load_frozen(run.abstract_frozen), before


def steps(
    run: Run,
    state: Any,
    frozen: Any,
    progress: Progress,
    data: grain.DatasetIterator,
    checkpoints: Checkpoints,
    workdir: epath.Path,
) -> tuple[Any, bool]:
    """Steps to the last step, or until a signal asks to stop; saves either way.

    Returns:
      The state, and whether the last step was reached.

    Raises:
      UserError: a step was not finite, or the loss has diverged. Nothing is saved from then on, but for a loss that is
        up at the last step, which is judged after that is saved.
    """
    config, step = run.config, int(state["step"])
    rate = make_schedule(config.optimizer, config.optimizer.learning_rate, config.steps)
    writing = RunWriter(workdir, step) if processes.first() else silent_writer()
    with contextlib.closing(writing) as writer, stop_on_signal() as stopping:
        while step < config.steps and not stopping(step):
            asked = time.monotonic()
            packed = next(data)
            waited = time.monotonic() - asked
            state, metrics = run.step(state, frozen, run.place(packed.arrays))
            progress.add(metrics, packed.documents, waited)
            step += 1
            with naming_the_last_checkpoint(checkpoints):
                if step % config.log_every == 0 or step == config.steps:
                    report = progress.report(
                        step, float(rate(step - 1)), packed.rejected, packed.examples, packed.epochs
                    )
                    writer.write_scalars(step, report)
                if step % config.checkpoint_every == 0:
                    checkpoints.save(step, state, data, progress.state(), sound=progress.sound)
                    writer.flush()
            del packed  # it is on the devices; while the next is waited for, one more is made
        with naming_the_last_checkpoint(checkpoints):
            checkpoints.save(step, state, data, progress.state(), sound=progress.sound)
            if step == config.steps:
                progress.end()
    return state, step == config.steps


@contextlib.contextmanager
def naming_the_last_checkpoint(checkpoints: Checkpoints) -> Iterator[None]:
    """Adds to the error of a stopped run where it can be taken up again."""
    try:
        yield
    except Stopped as stopped:
        error, workdir = stopped_message(stopped, checkpoints), checkpoints.path.parent
        if processes.first():
            suspects.keep(workdir, stopped.step, stopped.what, stopped.documents)
            (workdir / STOPPED_FILE).write_text(str(error))
        raise error from stopped


def stopped_message(stopped: Stopped, checkpoints: Checkpoints) -> UserError:
    """Returns the error that also names the last checkpoint from before the trouble, and those to remove."""
    checkpoints.wait()
    steps = checkpoints.steps()
    good, later = [step for step in steps if step <= stopped.sound], [step for step in steps if step > stopped.sound]
    after = ", ".join(map(str, later))
    if good:
        where = f"the last good checkpoint is {checkpoints.path / str(good[-1])}"
        where += f" (remove those after it, {after}, to go on from it)" if later else ""
    else:
        where = f"no checkpoint is from before it{f' ({after} are from after it)' if later else ''}: start again"
    return UserError(
        f"{stopped}; {where}; lower the learning rate (it may differ now, as may {', '.join(FREE_AFTER_STOP[2:])}), or "
        f"look at these documents (all in {checkpoints.path.parent / suspects.FOLDER})"
    )


def finish(run: Run, state: Any, frozen: Any, data: grain.DatasetIterator, workdir: epath.Path) -> None:
    """Writes the trained model, its adapter alone if it has one, where the data stands, the curve and the summary.

    The summary comes last: who finds it takes the run as finished.
    """
    (workdir / position.FOLDER).mkdir(exist_ok=True)
    position.write(workdir / position.FOLDER, data, first_process=processes.first())
    save_model(workdir / "model", run.final_params(state["trainable"], frozen), run.plan.sizes, run.processor)
    if run.config.lora:
        write_adapter(run, state["trainable"], frozen, workdir / ADAPTER_IN_WORKDIR)
    if processes.first():
        draw_curves(workdir)
        write_summary(workdir, state["trainable"], frozen)
    print(f"trained: model in {workdir / 'model'}, loss curve in {workdir / 'loss.png'}", flush=True)


def write_adapter(run: Run, trainable: Any, frozen: Any, folder: epath.Path) -> None:
    """Writes the adapter as a PEFT folder, or says why PEFT cannot hold what the run trained."""
    trained = trainable.get("params", {})
    spec, params = tuple(run.config.lora.values()), combine(trained, frozen)
    try:
        save_adapter(folder, trainable["adapters"], spec, trained, params, run.plan.sizes, base=run.config.init_from)
        print(f"adapter alone, in PEFT's form: {about(folder)}", flush=True)
    except UserError as error:
        print(f"no PEFT adapter was written: {error}", flush=True)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], bool]]:
    """Yields `stopping(step)`, to be asked before every step: whether a signal has come and the run stops here.

    SIGTERM or the first Ctrl-C asks to stop; a second one ends the process at once. With several processes the signal
    may come to any of them, and JAX agrees on the step between them (it has SIGTERM's handler); they wait for each
    other to save, so a further SIGTERM changes nothing.
    """
    received: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if processes.several():
            os.kill(os.getpid(), signal.SIGTERM)

    ours = (signal.SIGINT,) if processes.several() else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, on_signal) for number in ours}
    try:
        yield multihost_utils.reached_preemption_sync_point if processes.several() else lambda _: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
