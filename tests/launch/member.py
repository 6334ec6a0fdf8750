"""What a process of a group does in test_processes.py: one of the functions below, named on the command line."""

import sys
import time

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from idefics_jax import commands, processes, sharding
from idefics_jax.errors import UserError
from idefics_jax.training.checkpoint import Checkpoints, with_shardings
from tests.idefics_jax.training.counting import Counting

# Where a kernel [layers, embed, mlp], its moments and a bias lie.
LAYOUTS = {
    "fsdp": {"kernel": PartitionSpec(None, "fsdp"), "bias": PartitionSpec("fsdp")},
    "tensor": {"kernel": PartitionSpec(None, None, "tensor"), "bias": PartitionSpec()},
}


def state() -> dict:
    """A state with every bit set at random, in both dtypes; the same in every process."""
    rng = np.random.default_rng(0)
    part = {"kernel": rng.normal(size=(2, 64, 32)).astype(np.float32), "bias": rng.normal(size=64).astype("bfloat16")}
    moments = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), part)
    return {"trainable": part, "opt_state": moments}


def placed(mesh: jax.sharding.Mesh, layout: str) -> dict:
    """Returns where the leaves of `state` lie."""
    return {name: {k: NamedSharding(mesh, spec) for k, spec in LAYOUTS[layout].items()} for name in state()}


def save(workdir: str, layout: str) -> None:
    """Saves `state` laid out over all devices."""
    where = placed(sharding.make_mesh({layout: -1}), layout)
    whole = jax.tree.map(lambda x, w: jax.make_array_from_callback(x.shape, w, lambda i: x[i]), state(), where)
    checkpoints = Checkpoints(epath.Path(workdir), keep=1)
    checkpoints.save(1, whole, Counting(), {}, sound=None)
    checkpoints.close()


def restore(workdir: str, layout: str) -> None:
    """Restores it, and says whether every part that lies here is what was saved, to the bit."""
    abstract = with_shardings(state(), placed(sharding.make_mesh({layout: -1}), layout))
    checkpoints = Checkpoints(epath.Path(workdir), keep=1)
    found, _ = checkpoints.restore(abstract, Counting())
    checkpoints.close()
    wanted = dict(jax.tree_util.tree_leaves_with_path(state()))
    parts = [
        (shard.data.shape, np.asarray(shard.data).tobytes() == wanted[path][shard.index].tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(found)
        for shard in leaf.addressable_shards
    ]
    equal = all(all(same for _, same in theirs) for theirs in processes.from_all(parts))
    print(f"{layout} on {jax.device_count()} devices, a part {parts[-1][0]}, equal: {equal}", flush=True)


def exchange() -> None:
    """Tells what each process hears from the others, and which rows of 4 it reads on three meshes."""
    from idefics_jax.training.run import row_share

    own = jax.process_index()
    heard = processes.from_all({"from": own, "text": "é" * 40 * own})
    assert heard == [{"from": index, "text": "é" * 40 * index} for index in range(jax.process_count())]

    def attempt():
        if own == 1:
            raise KeyError("only here")
        return own

    try:
        processes.by_all(attempt)
    except Exception as error:
        met = f"{type(error).__name__}: {error}"
    shares = []
    for sizes in ({"data": 4}, {"fsdp": 2, "tensor": 2}, {"tensor": 4}):
        share = row_share(sharding.make_mesh(sizes), 4)
        shares.append([share.index, share.count, share.leads])
    try:
        row_share(sharding.make_mesh({"data": 4}), 6)
    except UserError as error:
        refused = str(error)
    for index, said in enumerate(processes.from_all([met, shares, refused])):
        print(index, *said, sep=" | ", flush=True)


def fail(index: str) -> None:
    """Everyone waits for a process that meets a mistake of the user's; "all" meet the same one."""
    if index in ("all", str(jax.process_index())):
        raise UserError(f"mend process {index}")
    processes.wait_for_all("never")


def beat() -> None:
    """Meets the others again and again."""
    for beat in range(2000):
        processes.wait_for_all(f"beat {beat}")
        print(f"beat {beat}", flush=True)
        time.sleep(0.05)


def steps() -> None:
    """Steps until a signal comes to any of the processes, and tells at which step each stopped."""
    from idefics_jax.training.loop import stop_on_signal  # slow to import, and for one test alone

    step = 0
    with stop_on_signal() as stopping:
        while not stopping(step):
            print(f"step {step}", flush=True)
            time.sleep(0.05)
            step += 1
    print("stopped at", *processes.from_all(step)[:1], "and", *processes.from_all(step)[1:], flush=True)


def main(command: list[str]) -> None:
    with processes.joined():
        globals()[command[0]](*command[1:])


if __name__ == "__main__":
    sys.argv.insert(1, "--")
    commands.run(main, takes_command=True)
