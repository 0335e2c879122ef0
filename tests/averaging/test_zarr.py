"""Averages of zarr directories: their layout, what does not fit, what is no checkpoint."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from jasr import averaging
from jasr.averaging import AverageError
from jasr.averaging import foreign as fa
from jasr.interop import zarr_checkpoint
from tests.interop.test_zarr_checkpoint import make


def normal(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def zarr_tree(folder, step, seed, prefix="salm--val_loss=1.5"):
    """A directory of a distributed checkpoint; returns its arrays."""
    path = folder / f"{prefix}-step={step}-consumed_samples={8 * step}.0"
    arrays = {
        "model.linear.weight": make(path / "model.linear.weight", normal((6, 4), seed), (3, 4)),
        "model.norm.weight": make(
            path / "model.norm.weight", normal((5,), seed, ml_dtypes.bfloat16)
        ),
        "optimizer.state.exp_avg.model.linear.weight": make(
            path / "optimizer.state.exp_avg.model.linear.weight", normal((6, 4), seed + 9)
        ),
        "optimizer.step": make(path / "optimizer.step", np.int64([step])),
    }
    extra = path / "model.linear._extra_state"
    extra.mkdir()
    (extra / "shard_0_1.pt").write_bytes(bytes([seed % 256]))
    (path / "common.pt").write_bytes(b"common%d" % seed)
    (path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    return arrays


def test_zarr_directories_are_averaged_in_their_layout(tmp_path):
    trees = {step: zarr_tree(tmp_path, step, step) for step in (100, 200, 300)}
    zarr_tree(tmp_path, 300, 4, prefix="old")
    (tmp_path / "old-step=300-consumed_samples=2400.0").rename(
        tmp_path / "x-step=300-samples=2400.0-last"
    )
    assert [m.step for m in fa.find_directories(tmp_path)] == [100, 200, 300]
    members = fa.find_directories(tmp_path, steps=(300, 100))
    assert [m.step for m in members] == [300, 100]
    output = tmp_path / fa.directory_name("salm", (300, 100))
    assert output.name == "salm-300_100-averaged"
    assert fa.directory_name("salm") == "salm-averaged"
    provenance = fa.average_directories(members, output)
    assert json.loads((output / averaging.PROVENANCE).read_text()) == provenance
    assert provenance["weights_from"] == "equal"
    first = members[0].path
    for name in ("model.linear.weight", "model.norm.weight"):
        mean = averaging.average([{"x": trees[step][name]} for step in (300, 100)])["x"]
        got = zarr_checkpoint.Array(output / name)
        assert got.dtype == trees[300][name].dtype
        assert np.asarray(got).tobytes() == mean.tobytes()
        assert got.header == zarr_checkpoint.Array(first / name).header
    for path in sorted(first.rglob("*")):
        copy = output / path.relative_to(first)
        assert copy.is_dir() == path.is_dir()
        if path.is_file() and not path.parent.name.startswith("model") or "_extra" in str(path):
            assert path.is_dir() or copy.read_bytes() == path.read_bytes()
    assert [m.step for m in fa.find_directories(tmp_path)] == [100, 200, 300]  # not the average
    with pytest.raises(AverageError, match="exists"):
        fa.average_directories(members, output)


def test_zarr_directories_that_do_not_fit_are_refused(tmp_path):
    for step in (1, 2):
        zarr_tree(tmp_path, step, step)
    members = fa.find_directories(tmp_path)
    with pytest.raises(AverageError, match=r"steps \[7\]"):
        fa.find_directories(tmp_path, steps=(1, 7))
    for name, value, told in (
        ("model.count", np.int32([1]), "model.count of .*step=1.* is int32"),
        ("model.bad", np.float32([np.nan]), "model.bad of .*step=2.* has NaN"),
        ("model.bad", np.float32([1, 2]), r"~ model.bad is \(2,\), wanted \(1,\)"),
    ):
        good = np.ones(1, value.dtype) if value.dtype == np.float32 else value
        make(members[0].path / name, good)
        make(members[1].path / name, value)
        with pytest.raises(AverageError, match=told):
            fa.average_directories(members, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
        for m in members:
            shutil.rmtree(m.path / name)
    shutil.copytree(members[0].path, tmp_path / "x-step=3")
    with pytest.raises(AverageError, match="x-step=3 is the same checkpoint as .*step=1-"):
        fa.average_directories([m.path for m in members] + [tmp_path / "x-step=3"], tmp_path / "o")
    for m in members:
        make(m.path / "optimizer.state" / "deep", np.zeros(1))
    make(members[1].path / "weights" / "model.deep", np.zeros(1))
    with pytest.raises(AverageError, match="step=2.*/model.deep is an array inside weights,"):
        fa.average_directories(members, tmp_path / "out")
    shutil.rmtree(members[1].path / "weights")
    (members[1].path / "model.linear.weight" / "1.0").unlink()
    with pytest.raises(zarr_checkpoint.ZarrError, match="1 chunks of 2"):
        fa.average_directories(members, tmp_path / "out")
    with pytest.raises(AverageError, match="no checkpoint directory"):
        fa.find_directories(members[0].path / "model.linear.weight")


def test_directories_without_arrays_are_left_out_and_named(tmp_path):
    zarr_tree(tmp_path, 1, 1)
    for name in ("wandb/run", "logs"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.warns(UserWarning, match="left out, .*: logs, wandb$"):
        assert [m.step for m in fa.find_directories(tmp_path)] == [1]
    assert [m.step for m in fa.find_directories(tmp_path, steps=(1,))] == [1]
