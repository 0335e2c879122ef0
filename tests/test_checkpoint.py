"""Checkpoints: whole or not trusted, on any mesh, loud when damaged."""

import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jasr import checkpoint
from jasr.checkpoint import MANIFEST, CheckpointError, Checkpoints

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "model": {
            "layers_0": {"kernel": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)},
            "head": {"bias": jnp.asarray(rng.normal(size=(6,)), jnp.bfloat16)},
        }
    }
    return {
        "params": params,
        "batch_stats": {},
        "opt_state": TX.init(params),
        "ema": jax.tree.map(lambda x: x * 2, params),
        "rng": {"key": jax.random.key(seed), "step": jnp.int32(seed), "host": np.arange(3)},
    }


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def one(x):
        if isinstance(x, jax.Array):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return x

    return jax.tree.map(one, state)


def host_params(seed):
    return jax.tree.map(np.asarray, make_state(seed)["params"])


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A run directory with steps 10, 20, 30 (copied by the tests that break it)."""
    run = tmp_path_factory.mktemp("three") / "run"
    with Checkpoints(run / "checkpoints", keep_latest=3) as c:
        for step, wer in ((10, 0.2), (20, 0.3), (30, 0.4)):
            assert c.save(step, make_state(step), {"position": step}, {"val_wer": wer}, wait=True)
    return run


@pytest.fixture
def run(three_steps, tmp_path):
    return shutil.copytree(three_steps, tmp_path / "run")


def files_of(step):
    return [p for p in sorted(step.rglob("*")) if p.is_file()]


def test_state_comes_back_bit_for_bit_with_its_types(run):
    with Checkpoints(run / "checkpoints") as c:
        step, state, meta = c.restore(None, abstract(make_state()))
        assert c.metrics(step) == {"val_wer": 0.4}
    assert step == 30 and meta == {"position": 30}
    assert_same(state, make_state(30))


def test_an_empty_directory_restores_nothing(tmp_path):
    with Checkpoints(tmp_path / "c") as c:
        assert c.restore(None, abstract(make_state())) is None
        assert c.steps() == []


def test_newest_and_best_are_kept_and_nan_is_never_best(tmp_path):
    metrics = [0.5, 0.1, float("nan"), 0.2, None, 0.9, 0.8]
    with Checkpoints(tmp_path / "c", keep_latest=2, keep_best=2) as c:
        for i, m in enumerate(metrics):
            c.save(i + 1, {"params": {"w": jnp.ones(2)}}, {}, {} if m is None else {"val_wer": m})
        c.close()
        assert c.steps() == [2, 4, 6, 7]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "4", "6", "7"]


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_every_damaged_file_is_named_and_the_step_before_is_used(run, how):
    """Each file of step 30 in turn; the ones that Orbax writes last carry no data."""
    root = run / "checkpoints"
    like = abstract({"params": make_state()["params"]})
    whole = run / "whole"
    shutil.copytree(root / "30", whole)
    for name in [p.relative_to(whole).as_posix() for p in files_of(whole)]:
        damage(root / "30" / name, how)
        if name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            assert checkpoint.verify(root / "30") == []
            assert_same(checkpoint.load_params(run, 30, "params"), host_params(30))
        else:
            assert name in "\n".join(checkpoint.verify(root / "30"))
        shutil.copy(whole / name, root / "30" / name)
    with Checkpoints(root) as c:
        damage(root / "30" / "params" / "manifest.ocdbt", how)
        with pytest.warns(RuntimeWarning, match="params/manifest.ocdbt"):
            step, state, _ = c.restore(None, like)
        assert c.steps() == [10, 20]
        assert c.save(30, make_state(7), {}, {"val_wer": 0.0}, wait=True)  # replaced
        assert c.restore(None, like)[0] == 30
    assert step == 20
    assert_same(state["params"], make_state(20)["params"])


def test_when_no_step_is_good_one_error_names_them_all(run):
    root = run / "checkpoints"
    for s in (10, 20, 30):
        damage(root / str(s) / "meta" / "metadata", "flipped")
    with Checkpoints(root) as c, pytest.warns(RuntimeWarning):
        with pytest.raises(CheckpointError, match=r"(?s)/30.*meta/metadata.*/20.*/10"):
            c.restore(None, abstract(make_state()))


def test_an_exact_step_that_is_damaged_is_not_replaced_by_another(run):
    damage(run / "checkpoints" / "20" / "meta" / "metadata", "missing")
    with Checkpoints(run / "checkpoints") as c, pytest.warns(RuntimeWarning):
        with pytest.raises(CheckpointError, match="meta/metadata is missing"):
            c.restore(20, abstract(make_state()))


def test_wrong_config_lists_missing_unexpected_and_different_leaves(run):
    like = abstract(make_state())
    like["params"]["model"]["extra"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    like["params"]["model"]["head"]["bias"] = jax.ShapeDtypeStruct((6,), jnp.float32)
    like["params"]["model"]["layers_0"] = {"kernel": jax.ShapeDtypeStruct((8, 5), jnp.float32)}
    del like["ema"]["model"]["head"]
    with Checkpoints(run / "checkpoints") as c:
        with pytest.raises(CheckpointError) as e:
            c.restore(None, like)
    for line in (
        "- params/model/extra (2,)",
        "~ params/model/layers_0/kernel is (8, 6), wanted (8, 5)",
        "~ params/model/head/bias is bfloat16, wanted float32",
        "+ ema/model/head/bias (6,)",
    ):
        assert line in str(e.value)


def test_state_saved_on_eight_devices_comes_back_on_another_mesh_and_on_none(root, tmp_path):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jasr.sharding import MeshConfig, make_mesh

    w = np.arange(64, dtype=np.float32).reshape(8, 8)
    eight = NamedSharding(make_mesh(MeshConfig(fsdp=8, data=1)), P("fsdp"))
    four = NamedSharding(
        make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4]), P("tensor", "fsdp")
    )
    with Checkpoints(tmp_path / "checkpoints") as c:
        c.save(1, {"params": {"w": jax.device_put(w, eight)}}, {}, {}, wait=True)
        like = {"params": {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=four)}}
        got = c.restore(1, like)[1]["params"]["w"]
    assert got.sharding == four
    np.testing.assert_array_equal(np.asarray(got), w)
    # In a process with one device: Orbax by itself would look for the eight.
    code = "import sys, jasr; x = jasr.load_params(sys.argv[1])['w']; print(type(x), x.tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=root,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"<class 'numpy.ndarray'> {w.tolist()}\n", done.stderr


def test_donated_arrays_do_not_change_what_is_being_saved(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((256, 256))
    host = np.zeros(5)
    with Checkpoints(tmp_path / "c") as c:
        c.save(1, {"params": {"x": x, "host": host}}, {}, {})
        for _ in range(3):
            x = step(x)
        host += 1
        c.wait()
    params = checkpoint.load_params(tmp_path / "c")
    assert not params["x"].any() and not params["host"].any()


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
    from jasr import checkpoint_files

    real = {
        "seal": checkpoint.seal,
        "replace": os.replace,
        "sync": checkpoint.sync_directory,
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
        monkeypatch.setattr(checkpoint, "seal", sealing)
        monkeypatch.setattr(os, "replace", replacing)
        monkeypatch.setattr(checkpoint, "sync_directory", syncing)
        monkeypatch.setattr(checkpoint_files.shutil, "rmtree", removing)
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
            m.setattr(checkpoint, "seal", full)
            assert not c.save(40, make_state(40), {}, {}, wait=True)
        assert c.steps() == [10, 20, 30] and c.failures == 1
        assert c.save(40, make_state(40), {}, {"val_wer": 0.1}, wait=True)
        assert c.failures == 0 and 40 in c.steps()


def test_orbax_alone_reads_a_run(run):
    """The layout is the one of Orbax's own manager: metrics, best step and trees."""
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(
        run / "checkpoints",
        options=ocp.CheckpointManagerOptions(
            best_fn=lambda m: m["val_wer"], best_mode="min", read_only=True
        ),
        item_handlers={"params": ocp.PyTreeCheckpointHandler()},
    )
    assert list(manager.all_steps()) == [10, 20, 30] and manager.best_step() == 10
    shapes = manager.item_metadata(10).params.tree
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    args = ocp.args.Composite(params=ocp.args.PyTreeRestore(restore_args=numpy))
    assert_same(manager.restore(10, args=args)["params"], host_params(10))


def test_any_place_of_a_run_names_its_parameters(run, tmp_path):
    moved = shutil.move(run, tmp_path / "elsewhere é")
    expected = jax.tree.map(lambda x: x * 2, make_state(30)["params"])
    for path in (moved, moved / "checkpoints", moved / "checkpoints" / "30"):
        assert_same(checkpoint.load_params(path), jax.tree.map(np.asarray, expected))
        assert checkpoint.load_meta(path) == {"position": 30}
    assert checkpoint.load_meta(moved, "best") == {"position": 10}
    assert checkpoint.load_meta(moved, 20) == {"position": 20}
    assert_same(checkpoint.load_params(moved, "best", "params"), host_params(10))
    assert checkpoint.load_params(moved, item="batch_stats") == {}
    with pytest.raises(CheckpointError, match=r"step 25 is not in .*\[10, 20, 30\]"):
        checkpoint.load_params(moved, 25)
    with pytest.raises(CheckpointError, match="has no item 'frozen', only"):
        checkpoint.load_params(moved, item="frozen")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.load_params(tmp_path)


def test_loading_falls_back_loudly_unless_the_step_was_named(run):
    damage(run / "checkpoints" / "30" / "params" / "manifest.ocdbt", "flipped")
    assert checkpoint.load_meta(run) == {"position": 30}  # the file is not part of it
    with pytest.warns(RuntimeWarning, match="/30: params/manifest.ocdbt has changed"):
        got = checkpoint.load_params(run, item="params")
    assert_same(got, host_params(20))
    with pytest.raises(CheckpointError, match="/30: params/manifest.ocdbt has changed"):
        checkpoint.load_params(run, 30, "params")


def test_a_step_saved_or_restored_is_not_saved_again(run):
    with Checkpoints(run / "checkpoints") as c:
        c.restore(None, abstract(make_state()))
        assert not c.save(30, make_state(1), {}, {})
        assert c.save(31, make_state(1), {}, {}) and not c.save(31, make_state(1), {}, {})


def test_mistakes_of_the_caller_raise_at_once(tmp_path):
    with Checkpoints(tmp_path / "c") as c:
        with pytest.raises(TypeError, match="JSON"):
            c.save(1, {"params": {"w": np.ones(1)}}, {"a": object()}, {})
        with pytest.raises(ValueError, match="meta"):
            c.save(1, {"meta": {"w": np.ones(1)}}, {}, {})
    with pytest.raises(ValueError, match="keep_latest"):
        Checkpoints(tmp_path / "c", keep_latest=0)


def test_doctor_lists_steps_and_names_damaged_files(run, capsys):
    from experiments import doctor

    assert doctor.main(["checkpoint", str(run), "--tree"]) == 0
    told = capsys.readouterr().out
    assert f"{run}/checkpoints/10: whole" in told and "val_wer 0.2000" in told
    assert "params                   54 numbers in 2 arrays" in told
    assert "params/model/layers_0/kernel" in told and "3 whole, 0 damaged" in told
    damage(run / "checkpoints" / "20" / "params" / "manifest.ocdbt", "flipped")
    (run / "checkpoints" / "30" / MANIFEST).unlink()
    (run / "checkpoints" / "31.orbax-checkpoint-tmp").mkdir()
    assert doctor.main(["checkpoint", str(run)]) == 1
    told = capsys.readouterr().out
    assert "/20: DAMAGED" in told and "params/manifest.ocdbt has changed" in told
    assert "/30: DAMAGED" in told and "31.orbax-checkpoint-tmp: a save" in told
    assert doctor.main(["checkpoint", str(run / "checkpoints" / "10"), "--fast"]) == 0
    assert doctor.main(["checkpoint", str(run / "nowhere")]) == 1


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
        with mock.patch.object(checkpoint, name, full) if me == where else nullcontext():
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
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
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
    told = [p.communicate(timeout=600)[0] for p in processes]
    assert "good 0" in told[0] and "good 1" in told[1], "\n".join(told)[-6000:]
    loaded = checkpoint.load_params(tmp_path / "c")["w"]
    np.testing.assert_array_equal(loaded, 4 * np.arange(32, dtype=np.float32).reshape(8, 4))
