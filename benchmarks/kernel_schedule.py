"""Cycles of the attention kernel, read from the instructions that libtpu schedules for a TPU.

    python -m benchmarks.kernel_schedule SLICE QUERIES KEYS HEADS KV_HEADS HEAD_DIM

Estimates of a compiled program leave kernels of our own out. But libtpu can write down the bundles of instructions that
it makes of them, one a cycle, so a kernel's cycles can be counted: those of the longest run without a branch, which is
what a pair of blocks always costs, and all bundles that a step of the grid could pass, which bounds it from above. What
is not in them is waiting for memory.

The command compiles the forward and backward kernel and prints how many heads a step of each computes, as JSON. `of`
runs it in a process of its own, as libtpu reads its settings once.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from idefics_jax import flash_attention
from idefics_jax.visibility import Visibility
from launch import program

KERNELS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An attention of one row: its lengths, heads and their width."""

    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Cycles:
    """What a pair of blocks of one head costs: at least, and at most but for waiting for memory."""

    least: float
    most: float


def of(slice_name: str, shape: Shape) -> dict[str, Cycles]:
    """Returns the cycles of each of KERNELS on a core of a slice's chips.

    Raises:
      RuntimeError: the kernels could not be compiled, or libtpu wrote no bundles.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": settings}
        command = [sys.executable, "-m", __spec__.name, slice_name, *map(str, dataclasses.astuple(shape))]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the kernels of {shape} could not be compiled for {slice_name}:\n{done.stderr}")
        heads = json.loads(done.stdout.splitlines()[-1])
        return {name: _read(Path(folder), name, heads[name]) for name in KERNELS}


def _read(folder: Path, name: str, heads: int) -> Cycles:
    """Counts the bundles of a kernel: "address [label]: { instructions }", one a line."""
    files = [
        path
        for path in folder.glob(f"*flash_attention_{name}*-final_bundles.txt")
        if "schedule-analysis" not in path.name
    ]
    if not files:
        raise RuntimeError(f"libtpu wrote no bundles of the {name} kernel; its settings may have changed")
    longest = run = total = 0
    for line in files[0].read_text().splitlines():
        if re.match(r"\s*0x[0-9a-f]+\s.*:", line):
            total, run = total + 1, run + 1
            # A branch, or a place that one leads to, ends a run.
            if "sbr.rel" in line or re.match(r"\s*0x[0-9a-f]+ (LH|LB|LE|PF|CT)", line):
                run = 0
            longest = max(longest, run)
    return Cycles(longest / heads, total / heads)


def main() -> None:
    slice_name, *numbers = sys.argv[1:]
    shape = Shape(*map(int, numbers))
    mesh = Mesh(program.slice_devices(slice_name)[:1], ("x",))
    whole = NamedSharding(mesh, PartitionSpec())

    def array(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *sizes), dtype, sharding=whole)

    def score(query, key, value, of_query, of_key):
        seen = Visibility(of_query, of_key)
        out = flash_attention.flash_attention(query, key, value, seen, interpret=False)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    keys = array(shape.keys, shape.kv_heads, shape.head_dim)
    ids = (array(length, dtype=jnp.int32) for length in (shape.queries, shape.keys))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(score, (0, 1, 2)))
        gradient.lower(array(shape.queries, shape.heads, shape.head_dim), keys, keys, *ids).compile()
        row_bytes = flash_attention.gradient_bytes(shape.queries, shape.head_dim, 2)
        steps = (flash_attention.heads_a_step(shape.heads, shape.kv_heads, size) for size in (0, row_bytes))
        print(json.dumps(dict(zip(KERNELS, steps, strict=True))))


if __name__ == "__main__":
    main()
