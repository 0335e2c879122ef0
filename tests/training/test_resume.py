"""A run that was killed goes on as if it had not been."""

import subprocess
import sys

import pytest

from tests.children import environment


@pytest.mark.slow
def test_run_killed_inside_its_saves_ends_bit_for_bit_like_an_undisturbed_one(root):
    """`python -m experiments.bench.resume` does the same with 30 kills, half at random times."""
    command = [sys.executable, "-m", "experiments.bench.resume", "--instants_only"]
    done = subprocess.run(
        [*command, "--kills=5", "--steps=6", "--save_every=1"],
        cwd=root,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "5 kills in 1 runs" in done.stdout
    assert "1 of 1 runs identical to the undisturbed one" in done.stdout
