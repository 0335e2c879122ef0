"""Checkpoints: whole or not trusted, on any mesh, loud when damaged."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr import checkpoint
from jasr.checkpoint import MANIFEST, CheckpointError, Checkpoints
from tests.checkpoint.states import abstract, assert_same, host_params, make_state
from tests.children import environment


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
        env=environment(),
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
        Checkpoints(tmp_path / "c", keep_latest=-1)


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
