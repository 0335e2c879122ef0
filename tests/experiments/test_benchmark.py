"""Every row of the benchmark command is there and explains itself without loading anything."""

import argparse
import importlib
import subprocess
import sys
import types

import numpy as np
import pytest

from experiments import benchmark


def test_help_of_every_row_loads_nothing_heavy(root):
    program = """
import sys
from experiments import benchmark
for row in benchmark.ROWS:
    try:
        benchmark.main([row, "--help"])
    except SystemExit as e:
        assert e.code == 0, row
print([m for m in "jax torch transformers lhotse scipy soundfile".split() if m in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("usage:") == len(benchmark.ROWS)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_all_goes_on_after_a_row_that_stops(monkeypatch, capsys):
    ran = []

    def load(name):
        row = name.rpartition(".")[2]

        def main(argv):
            ran.append(row)
            if row == "ctc":
                raise SystemExit("outputs differ")

        return types.SimpleNamespace(main=main)

    monkeypatch.setattr(importlib, "import_module", load)
    assert benchmark.main(["all"]) == 1
    assert ran == list(benchmark.ROWS)
    assert "ctc: outputs differ" in capsys.readouterr().err


def test_a_layer_that_never_updates_is_not_timed(capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["lact", "--frames=512", "--chunk=512"])
    assert "--frames must be above the chunk, 512" in capsys.readouterr().err


def test_lact_row_has_the_same_layer_on_both_sides(capsys):
    pytest.importorskip("torch")
    from experiments.bench import lact

    args = argparse.Namespace(
        frames=40, batch=1, hidden=32, heads=2, lact_heads=2, chunk=16, dtype="float32", muon="off"
    )
    ours = lact.jasr_side(args)
    assert all(abs(grad).max() > 0 for grad in ours()[2].values())
    lact.compare(ours, lact.torch_side(args), args)
    assert "largest difference" in capsys.readouterr().out


def test_parakeet_row_has_the_same_model_on_both_sides(tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.0")
    from experiments.bench import parakeet

    args = argparse.Namespace(
        layers=1, d_model=16, heads=2, channels=4, mels=16, vocabulary=8, batch=2, seconds=0.8
    )
    args.part, args.shortest, args.nemo_python = "step", 0.75, ""
    assert parakeet.write(args, tmp_path) > 0
    for name, make in parakeet.SIDES.items():
        np.savez(tmp_path / f"{name}.npz", **make(args, tmp_path)())
    parakeet.compare(tmp_path, parakeet.SIDES)
    assert "transformers: loss" in capsys.readouterr().out
