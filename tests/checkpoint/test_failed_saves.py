"""Saves that are killed, or fail on one process or a full disk: earlier steps stay."""

import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from jasr import checkpoint
from jasr.checkpoint import MANIFEST, CheckpointError, Checkpoints
from tests.checkpoint.states import abstract, assert_same, make_state
from tests.children import environment

INSTANTS = (
    "before the manifest",
    "manifest not renamed",
    "sealed",
    "committed",
    "old step renamed",
    "old step half deleted",
)


def snapshots_of_a_save(directory, into, monkeypatch):
    """What a kill at each instant of the save of step 3 (which lets 1 go) would leave behind."""
    from jasr.checkpoint import files

    real = {
        "seal": files.seal,
        "replace": os.replace,
        "sync": files.sync_directory,
        "rmtree": shutil.rmtree,
    }
    taken = {}

    def take(name):
        if name not in taken:
            taken[name] = shutil.copytree(directory, into / name.replace(" ", "_"))

    def sealing(*args, **kwargs):
        take("before the manifest")
        real["seal"](*args, **kwargs)
        take("sealed")

    def replacing(a, b):
        if str(b).endswith(MANIFEST):
            take("manifest not renamed")
        real["replace"](a, b)

    def syncing(path):
        if path == directory:
            take("committed")
        real["sync"](path)

    def removing(path, ignore_errors=False):
        if path.exists():
            take("old step renamed")
            for p in [p for p in path.rglob("*") if p.is_file()][::2]:
                p.unlink()
            take("old step half deleted")
        real["rmtree"](path, ignore_errors=ignore_errors)

    with Checkpoints(directory, keep_latest=2, keep_best=0) as c:
        for step in (1, 2):
            c.save(step, make_state(step), {"position": step}, {}, wait=True)
        monkeypatch.setattr("jasr.checkpoint.steps.seal", sealing)
        monkeypatch.setattr(os, "replace", replacing)
        monkeypatch.setattr("jasr.checkpoint.steps.sync_directory", syncing)
        monkeypatch.setattr(files.shutil, "rmtree", removing)
        c.save(3, make_state(3), {"position": 3}, {}, wait=True)
        monkeypatch.undo()
    assert set(taken) == set(INSTANTS)
    return taken


def test_killed_at_any_instant_of_a_save_leaves_a_directory_that_goes_on(tmp_path, monkeypatch):
    taken = snapshots_of_a_save(tmp_path / "c", tmp_path, monkeypatch)
    for instant in INSTANTS:
        with Checkpoints(taken[instant], keep_latest=2, keep_best=0) as c:
            step, state, meta = c.restore(None, abstract(make_state()))
            done = instant in ("committed", "old step renamed", "old step half deleted")
            assert step == (3 if done else 2), instant
            assert meta == {"position": step}
            assert_same(state, make_state(step))
            assert all(p.name.isdecimal() for p in taken[instant].iterdir()), instant
            assert c.save(4, make_state(4), {}, {}, wait=True)
            assert c.steps() == [step, 4]


def test_a_step_without_manifest_is_reported_and_replaced(run):
    root = run / "checkpoints"
    (root / "30" / MANIFEST).unlink()
    with pytest.warns(RuntimeWarning, match="/30 has no jasr_manifest.json"):
        c = Checkpoints(root)
    with c, pytest.warns(RuntimeWarning, match="half-written"):
        assert c.steps() == [10, 20]
        assert c.restore(None, abstract(make_state()))[0] == 20
        assert c.save(30, make_state(30), {}, {"val_wer": 0.1}, wait=True)
        assert c.restore(None, abstract(make_state()))[0] == 30
    with pytest.raises(CheckpointError, match="half-written"):
        (root / "10" / MANIFEST).unlink()
        checkpoint.load_params(run, 10)


DISK_FULL = """
import resource, sys, warnings
import numpy as np
from jasr.checkpoint import Checkpoints
state = lambda n: {"params": {"w": np.random.default_rng(n).normal(size=(200, 1000))}}
with Checkpoints(sys.argv[1]) as c:
    assert c.save(1, state(1), {}, {}, wait=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    assert not c.save(2, state(2), {}, {}, wait=True)
    assert c.save(3, state(3), {}, {})
    c.wait()
    assert c.failures == 2 and c.error.startswith("step 3: "), c.error
    assert sorted(p.name for p in c.directory.iterdir()) == ["1"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert c.save(4, state(4), {}, {}, wait=True)
    assert c.failures == 0 and c.error == "" and c.steps() == [1, 4]
"""


def test_full_disk_is_loud_keeps_the_last_good_step_and_the_run_goes_on(root, tmp_path):
    """A limit on the size of a file stands for the full disk."""
    done = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(tmp_path / "c")],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint of step 2" in done.stderr and "could NOT be saved" in done.stderr
    assert "the last good step is 1" in done.stderr


def test_disk_that_fills_up_while_the_manifest_is_written_fails_that_save_only(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with Checkpoints(run / "checkpoints") as c:
        with monkeypatch.context() as m, pytest.warns(RuntimeWarning, match="the disk is full"):
            m.setattr("jasr.checkpoint.steps.seal", full)
            assert not c.save(40, make_state(40), {}, {}, wait=True)
        assert c.steps() == [10, 20, 30] and c.failures == 1
        assert c.save(40, make_state(40), {}, {"val_wer": 0.1}, wait=True)
        assert c.failures == 0 and 40 in c.steps()


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import os, pathlib, traceback, warnings
from contextlib import nullcontext
from unittest import mock
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jasr import checkpoint
from jasr.checkpoint import CheckpointError, Checkpoints
warnings.simplefilter("ignore")
# a failed assertion ends both at once instead of waiting at the exit for the other
sys.excepthook = lambda *e: (traceback.print_exception(*e), sys.stderr.flush(), os._exit(1))
root, me = pathlib.Path(sys.argv[3]), int(sys.argv[2])
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
put = lambda x: jax.make_array_from_callback(x.shape, NamedSharding(mesh, P("d")), lambda i: x[i])
w = np.arange(32, dtype=np.float32).reshape(8, 4)
with Checkpoints(root, keep_latest=2, keep_best=0) as c:
    for step in (1, 2, 3):
        c.save(step, {"params": {"w": put(w * step)}}, {"step": step}, {})
    c.wait()
    assert c.failures == 0, c.error
    jax.experimental.multihost_utils.sync_global_devices("saved")
    assert c.steps() == [2, 3], c.steps()
    if me == 0:
        victim = root / "3" / "params" / "manifest.ocdbt"
        victim.write_bytes(victim.read_bytes()[:-1])
with Checkpoints(root, keep_latest=2, keep_best=0) as c:
    like = {"params": {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=put(w).sharding)}}
    step, state, meta = c.restore(None, like)
    assert (step, meta) == (2, {"step": 2})
    for shard in state["params"]["w"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), (w * 2)[shard.index])
    assert c.save(3, {"params": {"w": put(w * 3)}}, {"step": 3}, {}, wait=True)
    jax.experimental.multihost_utils.sync_global_devices("replaced")
    assert c.restore(None, like)[0] == 3

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def fails(step, name, where, told):
        with mock.patch(f"jasr.checkpoint.steps.{name}", full) if me == where else nullcontext():
            assert not c.save(step, {"params": {"w": put(w * step)}}, {}, {}, wait=True)
        assert c.failures and (told in c.error) == (me == 0), c.error
        assert c.steps() == [2, 3] and not list(root.glob(f"{step}*")), list(root.iterdir())

    fails(4, "seal", 0, "the disk is full")
    fails(5, "temporaries", 1, "process 1 did not write its part")
    fails(6, "delete", 0, "the disk is full")
    assert c.save(4, {"params": {"w": put(w * 4)}}, {}, {}, wait=True)
    jax.experimental.multihost_utils.sync_global_devices("again")
    assert c.steps() == [3, 4] and not c.failures
print("good", me)
"""


@pytest.mark.slow
def test_two_processes_agree_on_what_to_restore_and_on_which_saves_failed(root, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = environment(2)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", "import jax.experimental.multihost_utils\n" + TWO_PROCESSES]
            + [address, str(i), str(tmp_path / "c")],
            cwd=root,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    told = [p.communicate()[0] for p in processes]
    assert "good 0" in told[0] and "good 1" in told[1], "\n".join(told)[-6000:]
    loaded = checkpoint.load_params(tmp_path / "c")["w"]
    np.testing.assert_array_equal(loaded, 4 * np.arange(32, dtype=np.float32).reshape(8, 4))
