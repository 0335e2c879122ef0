"""A large tokenizer lies once on the disk, and every step is whole without the run."""

import json
import os
import shutil

import numpy as np
import pytest

from jasr import checkpoint
from jasr.checkpoint import CheckpointError, Checkpoints
from jasr.systems import source

LARGE = {"kind": "char", "vocabulary": [f"piece {n}" for n in range(10000)]}
SMALL = {"kind": "char", "vocabulary": ["<blank>", "a"]}
PARAMS = {"params": {"w": np.ones(3, np.float32)}}


@pytest.fixture
def run(tmp_path):
    with Checkpoints(tmp_path / "run" / "checkpoints") as c:
        for step in (1, 2):
            assert c.save(step, PARAMS, {"tokenizer": LARGE, "position": step}, wait=True)
    return tmp_path / "run"


def test_a_large_tokenizer_is_one_file_of_all_steps(run):
    (beside,) = run.glob("tokenizer-*.json")
    for step in (1, 2):
        directory = run / "checkpoints" / str(step)
        assert os.path.samefile(beside, directory / beside.name)
        kept = json.loads((directory / "meta" / "metadata").read_text())["tokenizer"]
        assert kept["kind"] == "char" and kept["file"] == beside.name and len(kept) == 3
    with Checkpoints(run / "checkpoints") as c:
        assert c.restore()[2]["tokenizer"] == LARGE


def test_a_step_that_is_copied_alone_is_whole(run, tmp_path):
    alone = shutil.copytree(run / "checkpoints" / "2", tmp_path / "alone")
    shutil.rmtree(run)
    assert checkpoint.load_meta(alone) == {"tokenizer": LARGE, "position": 2}
    kept = source.keep(source.resolve(alone), tmp_path)
    assert checkpoint.load_meta(kept["path"])["tokenizer"] == LARGE
    (name,) = alone.glob("tokenizer-*.json")
    name.write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer-.* has changed"):
        checkpoint.load_meta(alone)


def test_a_small_tokenizer_stays_in_meta(tmp_path):
    checkpoint.save_step(tmp_path / "small", PARAMS, {"tokenizer": SMALL})
    checkpoint.save_step(tmp_path / "large", PARAMS, {"tokenizer": LARGE})  # an average
    metas = [
        json.loads((tmp_path / n / "meta" / "metadata").read_text()) for n in ("small", "large")
    ]
    assert metas[0]["tokenizer"] == SMALL and "vocabulary" not in metas[1]["tokenizer"]
    assert checkpoint.load_meta(tmp_path / "large")["tokenizer"] == LARGE
