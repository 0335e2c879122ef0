"""Checkpoints: whole or not trusted, on any mesh, loud when damaged."""

import shutil

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
        shutil.rmtree(root / "30")
        shutil.copytree(whole, root / "30")
        damage(root / "30" / name, how)
        if name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            assert checkpoint.verify(root / "30") == []
            continue
        told = MANIFEST if name == MANIFEST else name
        assert told in "\n".join(checkpoint.verify(root / "30"))
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


def test_state_saved_on_eight_devices_comes_back_on_another_mesh_and_on_none(tmp_path):
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
    loaded = checkpoint.load_params(tmp_path)["w"]
    assert type(loaded) is np.ndarray
    np.testing.assert_array_equal(loaded, w)


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
