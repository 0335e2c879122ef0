"""`doctor data` says what a run would make of data, and fails where entries are bad."""

import json

import pytest
import soundfile

from experiments import doctor
from experiments.checks.data import main
from jasr.losses.ctc import frames_needed
from tests.corpora import make_corpus, noise, write_lines


def test_good_data_is_described(corpus, capsys):
    assert doctor.main(["data", corpus[0], "--num_buckets=2"]) == 0
    said = capsys.readouterr().out
    assert "24 utterances" in said and "24 usable, 0 bad, 0 outside the limits" in said
    assert "24 × 1 channel, 24 × 16000 Hz" in said
    assert "suggested: bucket_duration_bins=((" in said and "% padding" in said
    assert "' '" in said and "48 words" in said


@pytest.fixture
def poor(tmp_path):
    manifest, _ = make_corpus(tmp_path, 6)
    (tmp_path / "cut.flac").write_bytes(b"fLaC not really")
    soundfile.write(tmp_path / "whole.flac", noise(1.0, 1), 16000)
    (tmp_path / "half.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:9000])
    bad = [
        {"audio_filepath": "cut.flac", "duration": 1.0, "text": "cut"},
        {"audio_filepath": "half.flac", "duration": 1.0, "text": "half"},
        {"audio_filepath": "whole.flac", "duration": 1.0, "text": "très"},
        "{}",
    ]
    return write_lines(manifest, bad, "a")


def test_bad_entries_are_named_counted_and_written(poor, tmp_path, capsys):
    listed = tmp_path / "q" / "bad.jsonl"
    alphabet = " abcdefghijklmnopqrstuvwxyz"
    argv = [poor, "--quarantine", str(listed), "--alphabet", alphabet, "--max_duration=0.8"]
    assert main(argv) == 1
    said = capsys.readouterr().out
    assert "bad" in said and "half.flac" not in said  # left out by the limit, not decoded
    assert main([*argv[:-1], "--max_duration=0"]) == 1
    said = capsys.readouterr().out
    assert "6 usable, 4 bad, 0 outside the limits" in said
    for part in ("cut.flac", "half.flac", "'è'", "quarantined 1: missing key"):
        assert part in said
    found = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted(b["line"] for b in found) == [7, 8, 9, 10]


def test_a_sample_decodes_no_more_than_asked(corpus, capsys):
    assert main([corpus[0], "--sample=5"]) == 0
    assert "decoded 5:" in capsys.readouterr().out


def test_texts_too_long_for_a_model_are_bad(corpus, capsys):
    assert main([corpus[0], "--seconds_per_frame=0.2", "--show=2"]) == 1
    said = capsys.readouterr().out
    assert "text too long for its audio" in said and "more; --quarantine FILE lists all" in said
    assert frames_needed("abba") == 5


def test_data_that_cannot_be_read_is_status_2(tmp_path, capsys):
    assert main([str(tmp_path / "none.jsonl")]) == 2
    assert "does not exist" in capsys.readouterr().err
    empty = write_lines(tmp_path / "e.jsonl", [])
    assert main([empty]) == 1
