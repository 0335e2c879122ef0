"""Error rates, their intervals, and the writer."""

import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jasr import metrics

REFS = ["the quick brown fox", "please transcribe it", "a b c d", "", "안녕 하세요 여러분"]
HYPS = ["the quick fox jumps", "please transcribe it", "", "x", "안녕 하세요"]


def edits(a, b):
    """Levenshtein distance, one cell at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def test_rates_are_all_edits_over_all_words_and_characters():
    got = metrics.wer(REFS, HYPS)
    for i, (ref, hyp) in enumerate(zip(REFS, HYPS, strict=True)):
        a, b = ref.split(), hyp.split()
        assert got["per_utterance"][i].tolist() == [edits(a, b), len(a), edits(ref, hyp), len(ref)]
    assert got["words"] == 14 and got["word_errors"] == 8
    assert got["wer"] == 8 / 14
    assert got["sub"] + got["ins"] + got["del"] == got["word_errors"]
    assert got["cer"] == got["char_errors"] / got["chars"]


def test_rates_equal_nemo(shared_dir):
    want = json.loads((shared_dir / "goldens" / "nemo" / "metrics.json").read_text())
    got = metrics.wer(want["refs"], want["hyps"])
    assert got["wer"] == pytest.approx(want["wer"]) and got["cer"] == pytest.approx(want["cer"])
    for ref, hyp, pair in zip(want["refs"], want["hyps"], want["per_pair"], strict=True):
        one = metrics.wer([ref], [hyp])
        assert (one["wer"], one["cer"]) == pytest.approx((pair["wer"], pair["cer"]))


def test_nothing_of_nothing_is_no_error():
    assert metrics.wer([""], [""])["wer"] == 0.0
    assert metrics.wer([], [])["wer"] == 0.0
    assert metrics.wer([""], ["a"])["wer"] == math.inf


def test_whitespace_does_not_count():
    assert metrics.wer(["a  b "], [" a b"])["cer"] == 0.0


def test_unequal_numbers_of_texts_are_refused():
    with pytest.raises(ValueError, match="2 references but 1"):
        metrics.wer(["a", "b"], ["a"])


def test_missing_jiwer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ImportError, match="pip install jiwer"):
        metrics.wer(["a"], ["a"])


def test_interval_covers_the_true_rate_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    words = rng.integers(5, 15, (200, 80))
    errors = rng.binomial(words, 0.1)
    spans = [metrics.interval(e, w, samples=300) for e, w in zip(errors, words, strict=True)]
    covered = np.mean([low <= 0.1 <= high for low, high in spans])
    assert 0.88 < covered < 0.99


def test_interval_is_the_same_for_the_same_seed():
    errors, words = np.arange(20) % 3, np.full(20, 7)
    assert metrics.interval(errors, words) == metrics.interval(errors, words)
    low, high = metrics.interval(errors, words)
    assert low < errors.sum() / words.sum() < high


def test_interval_of_nothing_is_nan():
    assert all(math.isnan(x) for x in metrics.interval([], []))
    assert all(math.isnan(x) for x in metrics.interval([0], [0]))


def test_paired_comparison_sees_a_small_but_steady_gain():
    rng = np.random.default_rng(1)
    words = rng.integers(5, 15, 300)
    a = rng.binomial(words, 0.3)
    b = np.maximum(a - (rng.random(300) < 0.2), 0)
    got = metrics.compare(a, b, words)
    assert got["high"] < 0 and got["p_better"] > 0.99
    assert got["difference"] == pytest.approx((b.sum() - a.sum()) / words.sum())
    # Unpaired, the two intervals overlap.
    assert metrics.interval(b, words)[1] > metrics.interval(a, words)[0]


def test_paired_comparison_of_a_system_with_itself_finds_nothing():
    got = metrics.compare([1, 0, 2], [1, 0, 2], [5, 5, 5])
    assert (got["difference"], got["low"], got["high"], got["p_better"]) == (0, 0, 0, 0.5)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_writer_puts_one_line_on_stderr_and_one_in_the_file(tmp_path, capsys):
    writer = metrics.Writer(tmp_path / "run")
    writer.write(3, {"loss": jnp.float32(1.23456), "note": "x", "n": np.int64(4)})
    writer.close()
    out, err = capsys.readouterr()
    assert out == "" and err == "step 3  loss 1.235  note x  n 4\n"
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert row["step"] == 3 and row["loss"] == pytest.approx(1.23456) and row["n"] == 4


def test_writer_keeps_json_valid_when_a_loss_is_not_finite(tmp_path):
    metrics.Writer(tmp_path, quiet=True).write(1, {"loss": float("nan"), "wer": math.inf})
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert lines(tmp_path / "metrics.jsonl")[0]["loss"] == "nan"


def test_resumed_writer_drops_what_the_run_will_repeat_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metrics.Writer(tmp_path, quiet=True)
    for step in (10, 20, 30):
        writer.write(step, {"loss": 1.0})
    with open(path, "a") as f:
        f.write('{"step": 40, "lo')
    metrics.Writer(tmp_path, resume_step=20, quiet=True).write(30, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in lines(path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_starting_over_empties_the_file(tmp_path):
    metrics.Writer(tmp_path, quiet=True).write(0, {"loss": 1.0})
    metrics.Writer(tmp_path, resume_step=-1, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_missing_tensorboard_writer_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="pip install tensorboardX"):
        metrics.Writer(tmp_path, tensorboard=True)


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = metrics.Writer(tmp_path, tensorboard=True, quiet=True)
    writer.write(1, {"loss": 0.5, "note": "hello"})
    writer.close()
    assert any((tmp_path / "tensorboard").iterdir())


def test_no_progress_bar_where_there_is_no_terminal(capsys):
    assert list(metrics.progress([1, 2])) == [1, 2]
    assert capsys.readouterr().err == ""
