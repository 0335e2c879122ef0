"""Recordings in memory as a source, without the packages that read files."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from jasr import audio
from jasr.data import AudioText, DataConfig, DataError, memory, open_train
from tests.children import environment

RNG = np.random.default_rng(0)


def spoken(count, rate=16000):
    """Lines whose recordings are noise of 0.5 s and more."""
    sizes = [rate // 2 + 800 * n for n in range(count)]
    return [
        {"audio_filepath": RNG.normal(size=s, scale=0.1).astype(np.float32), "text": f"t{s}"}
        for s in sizes
    ]


def test_lines_in_memory_are_batches():
    lines = spoken(3)
    cfg = DataConfig(train=(memory.hold("lines", lines),), num_buckets=1, bucket_batch_size=(3,))
    trained = open_train(cfg, AudioText(cfg, 16000, lambda text: [len(text)]), seed=0)
    _, _, batch = next(trained.iterate())
    for row, number in enumerate(batch["index"]):
        heard = batch["audio"][row, : batch["audio_len"][row]]
        np.testing.assert_allclose(heard, lines[number]["audio_filepath"], atol=2**-15)


def test_a_segment_of_a_recording_in_memory():
    samples = RNG.normal(size=16000, scale=0.1).astype(np.float32)
    line = {"audio_filepath": samples, "text": "a", "offset": 0.25, "duration": 0.5}
    cfg = DataConfig(train=(memory.hold("part", [line]),), num_buckets=1, bucket_batch_size=(1,))
    trained = open_train(cfg, AudioText(cfg, 16000, lambda text: [1]), seed=0)
    _, _, batch = next(trained.iterate())
    np.testing.assert_allclose(batch["audio"][0, :8000], samples[4000:12000], atol=2**-15)


def test_what_is_not_held_is_named():
    cfg = DataConfig(train=("memory://nothing",))
    with pytest.raises(DataError, match="memory://nothing is not held by this process"):
        open_train(cfg, AudioText(cfg, 16000, lambda text: [1]), seed=0)
    with pytest.raises(DataError, match=r"line 1, audio_filepath: float64\[8\]; samples are f32"):
        memory.hold("doubles", [{"audio_filepath": np.zeros(8), "text": ""}])
    memory.hold("gone", spoken(1))
    kept = memory.hold("gone/too", spoken(1))
    memory.hold("gone", [])
    with pytest.raises(audio.AudioError, match="memory://gone/0: not held by this process"):
        memory.samples("memory://gone/0")
    assert len(memory.samples(f"{kept}/0")) == 8000


@pytest.mark.parametrize("check", ["files", "header", "decode"])
def test_bad_recordings_in_memory_are_quarantined_like_files(check, tmp_path):
    """One line each: nothing else of the source is lost, and its own line says what it is."""
    good, none, short, endless, left = spoken(5)
    none["audio_filepath"] = np.zeros(0, np.float32)
    short |= {"offset": 9.0, "duration": 0.2}
    endless["audio_filepath"][5] = np.inf
    left["audio_filepath"] = "memory://nobody/0"
    cfg = DataConfig(
        train=(memory.hold("mixed", [good, none, short, endless, left]),),
        num_buckets=1, bucket_batch_size=(1,), check=check, max_bad_share=0.9, num_threads=0,
    )  # fmt: skip
    path = tmp_path / "quarantine.jsonl"
    layout = AudioText(cfg, 16000, lambda text: [1])
    trained = open_train(cfg, layout, seed=0, quarantine_path=str(path))
    batches = trained.iterate()
    heard = {int(next(batches)[2]["index"][0]) for _ in range(12)} - {-1}
    assert heard == {0}
    assert {json.loads(line)["line"] for line in path.read_text().splitlines()} == {2, 3, 4, 5}


def test_the_documented_run_needs_no_packages_of_files(root, tmp_path):
    """What docs/environment.md shows trains and resumes where soundfile, lhotse, grain, jiwer,
    ml_collections and torch are not installed."""
    shown = (root / "docs" / "environment.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", shown, re.DOTALL)
    assert '"steps": 100' in code and 'loop.train(config, "runs/words")' in code
    first, last = (code.replace('"steps": 100', f'"steps": {n}, "log_every": 1') for n in (1, 2))
    missing = ("soundfile", "lhotse", "grain", "jiwer", "ml_collections", "torch")
    block = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    done = subprocess.run(
        [sys.executable, "-c", block + first + last],
        cwd=tmp_path, env=environment() | {"PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "runs" / "words" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(row) for row in rows]
    assert [row["step"] for row in found if "grad_norm" in row] == [1, 2]
    measured = [row["val_loss"] for row in found if "val_loss" in row]
    assert len(measured) == 2 and np.isfinite(measured).all()
