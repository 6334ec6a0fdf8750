"""Checkpoints: what comes back is what was saved, damage is seen and survived, a full disk is a sentence."""

import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from idefics_jax import sharding
from idefics_jax.errors import UserError
from idefics_jax.fingerprint import fingerprint
from idefics_jax.full_disk import check_room
from idefics_jax.training.checkpoint import Checkpoints
from tests.idefics_jax.training.counting import Counting


def state(seed: float) -> dict:
    return {"trainable": {"a": jnp.arange(6000.0) * seed, "b": jnp.ones((3, 2), jnp.bfloat16)}, "step": jnp.int32(seed)}


def data():
    return Counting()


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(1))


@pytest.fixture
def saved(tmp_path):
    """Three steps, each with the data advanced by as many elements."""
    checkpoints, iterator = Checkpoints(epath.Path(tmp_path), keep=3), data()
    for step in (1, 2, 3):
        next(iterator)
        checkpoints.save(step, state(step), iterator, [{"loss": 0.1 * step}], sound=None)
    checkpoints.close()
    return epath.Path(tmp_path)


def damage(workdir, step):
    """Flips one bit in the middle of the step's largest file."""
    files = [p for p in (workdir / "checkpoints" / str(step) / "state").glob("*/*/*")] + [
        p for p in (workdir / "checkpoints" / str(step) / "state").glob("*/*")
    ]
    path = max((p for p in files if p.is_file()), key=lambda p: p.stat().length)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def restore(workdir):
    checkpoints, iterator = Checkpoints(workdir, keep=3), data()
    try:
        return checkpoints.restore(abstract(), iterator), next(iterator)
    finally:
        checkpoints.close()


def test_the_newest_step_comes_back_with_the_datas_position(saved):
    (restored, interval), element = restore(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, state(3))
    assert element == 3
    assert interval == [{"loss": 0.1 * 3}]


def test_the_last_step_from_before_a_doubt_is_kept_until_the_doubt_is_over(tmp_path):
    checkpoints, iterator = Checkpoints(epath.Path(tmp_path), keep=2), data()
    for step, sound, wanted in (
        (1, None, [1]),
        (2, None, [1, 2]),
        (3, 1, [1, 2, 3]),
        (4, 1, [1, 3, 4]),
        (5, 1, [1, 4, 5]),
        (6, None, [5, 6]),
    ):
        checkpoints.save(step, state(step), iterator, [], sound=sound)
        checkpoints.wait()
        assert checkpoints.steps() == wanted
    checkpoints.close()


def test_no_checkpoint_is_no_state(tmp_path):
    assert restore(epath.Path(tmp_path))[0] is None


def test_a_flipped_bit_is_seen_and_the_step_before_is_used(saved):
    damage(saved, 3)
    (restored, _), element = restore(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, state(2))
    assert element == 2
    assert sorted(p.name for p in (saved / "checkpoints").iterdir() if "damaged" in p.name) == ["3.damaged"]


def test_nothing_intact_is_an_error_that_says_so(saved):
    for step in (1, 2, 3):
        damage(saved, step)
    with pytest.raises(UserError, match=r"none of the checkpoints \[3, 2, 1\] .* is intact"):
        restore(saved)


FROZEN = {"a": {"kernel": jnp.arange(5000.0) ** 1.5}}


def abstract_frozen():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), FROZEN)


def run_with_frozen(workdir):
    """A run of one checkpoint, with frozen parameters."""
    checkpoints = Checkpoints(workdir, keep=3)
    checkpoints.save_frozen(FROZEN)
    checkpoints.save(1, state(1), data(), [], sound=None)
    checkpoints.close()


def resumed(workdir):
    checkpoints = Checkpoints(workdir, keep=3)
    checkpoints.restore(abstract(), data())
    return checkpoints


def test_frozen_parameters_come_back_and_stay_known_in_later_checkpoints(tmp_path):
    run_with_frozen(epath.Path(tmp_path))
    for step in (2, 3):
        checkpoints = resumed(epath.Path(tmp_path))
        np.testing.assert_array_equal(checkpoints.load_frozen(abstract_frozen())["a"]["kernel"], FROZEN["a"]["kernel"])
        assert checkpoints.load_frozen({}) == {}
        checkpoints.save(step, state(step), data(), [], sound=None)
        checkpoints.close()


def test_a_new_run_replaces_the_frozen_parameters_that_an_earlier_one_left(tmp_path):
    Checkpoints(epath.Path(tmp_path), keep=3).save_frozen({"a": {"kernel": jnp.zeros(5000)}})
    run_with_frozen(epath.Path(tmp_path))
    frozen = resumed(epath.Path(tmp_path)).load_frozen(abstract_frozen())
    np.testing.assert_array_equal(frozen["a"]["kernel"], FROZEN["a"]["kernel"])


def test_frozen_parameters_of_another_run_are_named(tmp_path):
    run_with_frozen(epath.Path(tmp_path / "run"))
    Checkpoints(epath.Path(tmp_path / "other"), keep=3).save_frozen({"a": {"kernel": jnp.zeros(5000)}})
    shutil.rmtree(tmp_path / "run" / "frozen")
    (tmp_path / "other" / "frozen").rename(tmp_path / "run" / "frozen")
    with pytest.raises(UserError, match=r"frozen is damaged, or of another run: \['a'\]\['kernel'\]"):
        resumed(epath.Path(tmp_path / "run")).load_frozen(abstract_frozen())


def test_damaged_frozen_parameters_are_named(tmp_path):
    run_with_frozen(epath.Path(tmp_path))
    path = max((p for p in (tmp_path / "frozen").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"frozen is damaged, or of another run: \['a'\]\['kernel'\]"):
        resumed(epath.Path(tmp_path)).load_frozen(abstract_frozen())


def test_fingerprint_sees_changes_and_swaps_but_not_the_mesh():
    x = jax.random.normal(jax.random.key(0), (8, 16))
    plain = fingerprint({"x": x})
    assert fingerprint({"x": x.at[3, 5].add(1e-6)}) != plain
    assert fingerprint({"x": x[::-1]}) != plain
    mesh = sharding.make_mesh({"fsdp": -1})
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
    assert fingerprint({"x": spread}) == plain


def test_a_full_disk_is_a_sentence_and_leaves_the_older_step(tmp_path):
    program = """
        import resource, sys
        import jax.numpy as jnp
        from etils import epath
        from idefics_jax.errors import UserError
        from idefics_jax.training.checkpoint import Checkpoints
        from tests.idefics_jax.training.counting import Counting
        checkpoints = Checkpoints(epath.Path(sys.argv[1]), keep=2)
        data = Counting()
        state = {"a": jnp.arange(50_000.0) ** 1.5}
        checkpoints.save(1, state, data, [], sound=None)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            checkpoints.save(2, state, data, [], sound=None)
            checkpoints.wait()
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "cannot be written (File too large)" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "it goes on from step 1" in done.stdout
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == ["1"]


def test_too_small_a_disk_is_seen_before_anything_is_written(tmp_path):
    beyond = jax.ShapeDtypeStruct((shutil.disk_usage(tmp_path).free // 4 + 2**28,), jnp.float32)
    with pytest.raises(UserError, match=r"checkpoints cannot be written: it takes .* GiB and its disk has .* GiB free"):
        check_room(tmp_path / "checkpoints", {"a": beyond})
    check_room(tmp_path / "checkpoints", state(1))
