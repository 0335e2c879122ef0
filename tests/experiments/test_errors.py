"""The commands end in one line on standard error where a user can mend it."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from experiments.errors import in_one_line
from jasr import checkpoint, settings
from jasr.training import rundir, step


def test_settings_files_and_checkpoints_are_said_in_one_line(capsys, tmp_path):
    faults = {
        "config.train.stepz is not a field": lambda: settings.build(
            step.RunConfig, {"stepz": 1}, "config.train"
        ),
        "config.train.steps must be at least 1": lambda: settings.build(
            step.RunConfig, {"steps": 0}, "config.train"
        ),
        "no checkpoint in": lambda: checkpoint.load_meta(tmp_path / "none"),
        "No such file or directory: 'none.json'": lambda: open("none.json"),
    }
    for text, fault in faults.items():
        assert in_one_line(fault)() == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and text in said and said.count("\n") == 1


@pytest.mark.parametrize("wrong, right", [("optim.lrr", "lr"), ("optm.lr", "optim")])
def test_misspelt_flags_are_named_with_the_nearest_setting(wrong, right, root, tmp_path):
    train = [sys.executable, "-m", "experiments.train", "--config=tests/tiny.py"]
    ran = subprocess.run(
        [*train, f"--workdir={tmp_path}", f"--config.{wrong}=1"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1 and ran.stdout == "" and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith(f"error: there is no setting config.{wrong}. Did you mean")
    assert f'"{right}"' in ran.stderr


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    for fault, kind in ((lambda: 1 + "1", TypeError), (lambda: json.loads("{"), ValueError)):
        with pytest.raises(kind):
            in_one_line(fault)()
    inside = compile("int('x')", "nowhere.py", "exec")  # raised by C code that jasr called
    with pytest.raises(ValueError, match="invalid literal"):
        in_one_line(lambda: exec(inside, {"__name__": "jasr.anything"}))()
    monkeypatch.setenv("JASR_TRACEBACK", "1")
    with pytest.raises(ValueError, match="steps"):
        in_one_line(step.RunConfig)(steps=0)


@pytest.mark.parametrize("name", ["evaluate", "transcribe", "average", "doctor", "prepare_data"])
def test_every_command_ends_so(name):
    assert hasattr(importlib.import_module(f"experiments.{name}").main, "__wrapped__")


def test_training_on_a_directory_in_use_ends_so(tmp_path, root):
    train = [sys.executable, "-m", "experiments.train", "--config=tests/tiny.py"]
    with rundir.lock(tmp_path):
        ran = subprocess.run(
            [*train, f"--workdir={tmp_path}"], cwd=root, capture_output=True, text=True
        )
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
    assert f"in use by process {os.getpid()}" in ran.stderr
