"""The repository as `make lint` wants it."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(root, command):
    pytest.importorskip("ruff")
    files = ["jasr", "experiments", "configs", "tests", "setup.py"]
    try:  # what a user adds beside it is theirs
        listed = subprocess.run(
            ["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True
        )
        files = listed.stdout.split() or files
    except FileNotFoundError:
        pass
    ran = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *files], cwd=root, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
