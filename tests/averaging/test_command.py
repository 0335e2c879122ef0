"""experiments.average on NeMo's checkpoints: what it refuses at once, and what it writes."""

import hashlib
import re

import numpy as np
import pytest

from experiments import average as command
from jasr.averaging import foreign
from jasr.interop import nemo_archive, torch_file
from tests.interop.test_zarr_checkpoint import make


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two .ckpt files with their -EMA.ckpt and last.ckpt, and the .nemo that they belong to."""
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, value in (("step=1-val_wer=0.4", 1), ("step=2-val_wer=0.2", 3), ("last", 3)):
        for end, more in (("", 0), ("-EMA", 10)):
            state = {"w": np.full(2, value + more, np.float32)}
            torch_file.write(f"c/{name}{end}.ckpt", {"state_dict": state})
    torch_file.write("weights", {"w": np.zeros(2, np.float32)})
    nemo_archive.write("in.nemo", {"model_config.yaml": b"a: 1", "model_weights.ckpt": "weights"})
    return tmp_path


def hashes(folder):
    return {p: hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*") if p.is_file()}


IN = "--input_nemo=in.nemo"


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--output=c/last.ckpt"], "--output=c/last.ckpt exists and would be overwritten"),
        (["--output=c/step=1-val_wer=0.4.ckpt"], "exists and would be overwritten"),
        ([IN, "--output_nemo=in.nemo"], "--output_nemo=in.nemo exists and would be overwritten"),
        (["--input_nemo=nope.nemo", "--output_nemo=o.nemo"], "=nope.nemo: there is no such file"),
        ([IN, "--output_nemo=no/o.nemo"], "--output_nemo=no/o.nemo: there is no folder"),
        (["--output=no/o.ckpt"], "--output=no/o.ckpt: there is no folder"),
        (["--output=o.nemo"], "--output=o.nemo would be a .ckpt .* --output_nemo"),
        ([IN, "--output_nemo=o", "--output=./o"], "name the same file"),
        (["--output=o.ckpt", "--name=x"], "--name does nothing for .ckpt files: .*--output_nemo"),
        (["--output=o.ckpt", "--name_prefix=x"], "--name_prefix does nothing for .ckpt files"),
        (["--output=o.ckpt", "--top_n=-1"], "--top_n: wanted 1 or more, got -1"),
        (["--output=o.ckpt", "--top_n=0"], "--top_n: wanted 1 or more, got 0"),
    ],
)
def test_what_would_go_wrong_is_refused_before_any_work(folder, capsys, monkeypatch, flags, why):
    monkeypatch.setattr(foreign, "average_files", None)
    before = hashes(folder)
    with pytest.raises(SystemExit) as told:
        command.main(["--checkpoint_dir=c", *flags])
    assert told.value.code == 2
    assert re.search(why, capsys.readouterr().err)
    assert hashes(folder) == before


def test_ckpt_files_and_ema_files_are_averaged(folder):
    before = hashes(folder)
    for flags, want in (([], 2), (["--ema"], 12)):
        arguments = ["--checkpoint_dir=c", "--equal", "--output=o.ckpt", IN, "--output_nemo=o.nemo"]
        assert command.main([*arguments, *flags]) == 0
        np.testing.assert_array_equal(torch_file.read("o.ckpt")["state_dict"]["w"], [want] * 2)
        with nemo_archive.opened("o.nemo") as archive:
            start, size = archive.member(nemo_archive.WEIGHTS)
            state = torch_file.read(archive.tar, start=start, size=size)
            np.testing.assert_array_equal(state["w"], [want] * 2)
        (folder / "o.ckpt").unlink()
        (folder / "o.nemo").unlink()
    assert hashes(folder) == before


def test_zarr_directories_are_averaged_and_others_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("tensorstore")
    for step in (1, 2):
        make(tmp_path / "z" / f"a-step={step}-b" / "model.w", np.full(2, step, np.float32))
    (tmp_path / "z" / "wandb").mkdir()
    for flags, why in (
        (["--output=z"], "--output=z exists"),
        (["--name_prefix=a", "--metric=val_wer"], "--metric does nothing for zarr checkpoints"),
        (["--name_prefix=a", "--mode=min"], "--mode does nothing for zarr checkpoints"),
        (["--name_prefix=a", "--name=b"], "--name does nothing for zarr checkpoints"),
        (["--name_prefix=a", "--ema"], "--ema does nothing for zarr checkpoints"),
    ):
        with pytest.raises(SystemExit):
            command.main(["--checkpoint_dir=z", *flags])
        assert why in capsys.readouterr().err
    with pytest.warns(UserWarning, match="no zarr array in them: wandb"):
        assert command.main(["--checkpoint_dir=z", "--name_prefix=a"]) == 0
    assert "2 checkpoints, weights: equal" in capsys.readouterr().out
    assert command.main(["--checkpoint_dir=z", "--name_prefix=a", "--steps", "1", "2"]) == 0
