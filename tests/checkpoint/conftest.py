"""A run with three steps, made once a module."""

import shutil

import pytest

from jasr.checkpoint import Checkpoints
from tests.checkpoint.states import make_state


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
