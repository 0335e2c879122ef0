"""No entry can stop a run, be dropped in silence, or touch the others."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import soundfile

from jasr.data import DataConfig, DataError, index, open_eval, open_train
from jasr.data.entries import reason_class
from jasr.losses.ctc import frames_needed
from tests.corpora import encode, layout, make_corpus, noise, texts, write_lines

CFG = DataConfig(batch_duration=6.0, num_buckets=2, max_bad_share=1.0, num_threads=0)


def spoil(folder):
    """{kind: (manifest line, reason expected)} of entries that cannot be used."""
    (folder / "bad").mkdir()

    def file(name, content=b"", seconds=1.0, **write):
        path = folder / "bad" / name
        if write:
            soundfile.write(path, **write)
        else:
            path.write_bytes(content)
        return {"audio_filepath": f"bad/{name}", "duration": seconds, "text": "abc"}

    soundfile.write(folder / "whole.wav", noise(1, 99), 16000)
    soundfile.write(folder / "whole.flac", noise(1, 98), 16000)
    wav, flac = (folder / "whole.wav").read_bytes(), (folder / "whole.flac").read_bytes()
    with soundfile.SoundFile(folder / "bad" / "3h.flac", "w", 8000, 1) as f:
        for _ in range(90):
            f.write(np.zeros(8000 * 120, np.int16))
    nan = noise(1, 97)
    nan[5000] = np.nan
    ok = {"audio_filepath": "whole.wav", "duration": 1.0, "text": "whole"}
    decode = "undecodable audio"
    return {
        "broken json": ('{"audio_filepath": "a.wav", "dur', "bad JSON"),
        "not an object": ("[1, 2]", "bad JSON"),
        "not utf-8": (b'{"audio_filepath": "\xff\xfe"}', "bad JSON"),
        "no path": ({"duration": 1.0, "text": "abc"}, "missing key"),
        "no text": ({"audio_filepath": "whole.wav", "duration": 1.0}, "missing key"),
        "number as text": (ok | {"text": 17}, "text is not a string"),
        "null text": (ok | {"text": None}, "missing key"),
        "path is a list": (ok | {"audio_filepath": ["a"]}, "audio_filepath is not a path"),
        "duration is text": (ok | {"duration": "1 s"}, "offset or duration is not a number"),
        "duration is NaN": (ok | {"duration": float("nan")}, "offset or duration is not a number"),
        "duration 0": (ok | {"duration": 0}, "duration is not above 0"),
        "empty text": (ok | {"text": ""}, "empty text"),
        "blank text": (ok | {"text": " \n"}, "empty text"),
        "unknown characters": (ok | {"text": "abc ÿ"}, "text cannot be encoded"),
        "all unknown": (ok | {"text": "漢字"}, "text cannot be encoded"),
        "missing file": (ok | {"audio_filepath": "bad/none.wav"}, "missing file"),
        "a directory": (ok | {"audio_filepath": "bad"}, decode),
        "duplicate": ({"audio_filepath": "./whole.flac", "text": "first"}, "duplicate"),
        "duplicate id": (file("d.wav", wav) | {"id": "twice"}, "duplicate id"),
        "truncated wav": (file("t.wav", wav[: len(wav) // 2]), decode),
        "truncated flac": (file("t.flac", flac[: len(flac) // 2]), decode),
        "header only": (file("h.wav", wav[:44]), decode),
        "zero bytes": (file("z.wav"), decode),
        "zero samples": (file("e.wav", data=np.zeros(0), samplerate=16000), decode),
        "text as audio": (file("x.wav", b"not audio " * 50), decode),
        "NaN": (file("n.wav", data=nan, samplerate=16000, subtype="FLOAT"), decode),
        "declared longer": (file("l.wav", wav, seconds=2.5), "duration mismatch"),
        "declared shorter": (file("s.wav", wav, seconds=0.5), "duration mismatch"),
        "segment after the end": (ok | {"offset": 3.0, "duration": 1.0}, "duration mismatch"),
        "too long text": (file("c.wav", wav) | {"text": "a" * 200}, "text too long for its audio"),
        "3 hours": ({"audio_filepath": "bad/3h.flac", "text": "a"}, "too long"),
        "symlink loop": (ok | {"audio_filepath": "bad/loop.wav"}, decode),
    }  # fmt: skip


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """(clean manifest, manifest with a bad entry after each good one, the bad ones)."""
    folder = tmp_path_factory.mktemp("spoiled")
    _, good = make_corpus(folder, 20)
    bad = spoil(folder)
    (folder / "bad" / "loop.wav").symlink_to("loop.wav")
    soundfile.write(folder / "one.wav", noise(0.5, 96), 16000)
    good.insert(0, {"audio_filepath": "whole.flac", "duration": 1.0, "text": "first"})
    good.insert(0, {"audio_filepath": "one.wav", "duration": 0.5, "text": "one", "id": "twice"})
    clean = write_lines(folder / "clean.jsonl", good)
    with open(folder / "mixed.jsonl", "wb") as f:
        for ours, theirs in itertools.zip_longest(good, [line for line, _ in bad.values()]):
            for line in filter(None, (ours, theirs)):
                line = json.dumps(line) if isinstance(line, dict) else line
                f.write((line.encode() if isinstance(line, str) else line) + b"\n")
    return clean, str(folder / "mixed.jsonl"), bad


def test_each_bad_entry_is_quarantined_with_its_reason(spoiled, tmp_path):
    _, mixed, bad = spoiled
    cfg = dataclasses.replace(CFG, train=(mixed,), check="decode")
    path = tmp_path / "new" / "quarantine.jsonl"
    train = open_train(cfg, layout(cfg, encode, frames_needed, 0.02), 0, str(path))
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == len(bad)
    lines = open(mixed, "rb").read().splitlines()
    by_line = {lines[q["line"] - 1]: q for q in found}
    for kind, (line, reason) in bad.items():
        raw = json.dumps(line) if isinstance(line, dict) else line
        q = by_line[raw.encode() if isinstance(raw, str) else raw]
        assert reason_class(q["reason"]) == reason, (kind, q)
        assert q["source"] == mixed
    said = train.describe()
    assert "quarantined 2: empty text" in said and "left out 1: too long" in said


def batches_of(train, count=8):
    return [batch for (_, _, batch), _ in zip(train.iterate(), range(count), strict=False)]


def test_good_entries_are_untouched_by_bad_ones(spoiled):
    clean, mixed, _ = spoiled
    cfg = dataclasses.replace(CFG, check="decode")
    pair = [
        open_train(
            dataclasses.replace(cfg, train=(m,)), layout(cfg, encode, frames_needed, 0.02), 3
        )
        for m in (clean, mixed)
    ]
    assert pair[0].fingerprint == pair[1].fingerprint
    assert pair[0].shapes == pair[1].shapes
    for a, b in zip(*map(batches_of, pair), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("threads", [0, 2])
def test_audio_that_fails_in_the_loader_becomes_padding_and_a_line(spoiled, tmp_path, threads):
    clean, mixed, bad = spoiled
    path = tmp_path / "quarantine.jsonl"
    cfg = dataclasses.replace(CFG, train=(mixed,), check="none", num_threads=threads)
    train = open_train(cfg, layout(cfg), 0, str(path))
    before = len(path.read_text().splitlines())
    seen = [row for batch in batches_of(train, 40) for row in rows(batch)]
    failing = {k for k, (_, r) in bad.items() if r in LOADING}
    assert len(train.failed) == len(failing)
    assert len(path.read_text().splitlines()) == before + len(failing)
    usable = {audio for audio, *_ in rows_of(clean)}
    assert {audio for audio, *_ in seen} >= usable
    assert all(tokens for _, tokens in seen)


LOADING = ("undecodable audio", "missing file", "duration mismatch")


def rows(batch):
    """(audio bytes, token ids) of each row that is no padding."""
    for i in range(len(batch["index"])):
        if batch["index"][i] < 0:
            assert batch["audio_len"][i] == 0 and batch["token_len"][i] == 0
            assert not batch["audio"][i].any() and not batch["tokens"][i].any()
            continue
        n, t = batch["audio_len"][i], batch["token_len"][i]
        assert not batch["audio"][i, n:].any() and not batch["tokens"][i, t:].any()
        yield batch["audio"][i, :n].tobytes(), tuple(batch["tokens"][i, :t].tolist())


def rows_of(manifest):
    cfg = dataclasses.replace(CFG, max_bad_share=0.0)
    return [row for _, b in open_eval(cfg, manifest, layout(cfg)).iterate() for row in rows(b)]


def test_the_run_stops_above_the_bad_share(spoiled):
    _, mixed, _ = spoiled
    cfg = dataclasses.replace(CFG, train=(mixed,), max_bad_share=0.3, check="decode")
    with pytest.raises(DataError, match=r"30 of 54 entries .* data.max_bad_share=0.3"):
        open_train(cfg, layout(cfg), 0)


@pytest.mark.parametrize("threads", [0, 2])
def test_the_run_stops_when_too_many_fail_in_the_loader(tmp_path, threads):
    path, entries = make_corpus(tmp_path, 10)
    cfg = dataclasses.replace(CFG, train=(path,), check="none", max_bad_share=0.2)
    train = open_train(dataclasses.replace(cfg, num_threads=threads), layout(cfg), 0)
    for e in entries[:3]:
        (tmp_path / e["audio_filepath"]).write_bytes(b"gone")
    with pytest.raises(DataError, match="could not be decoded"):
        batches_of(train, 40)


@pytest.fixture
def failing(tmp_path):
    """(open_train's settings, quarantine file): three of ten files break after the index."""
    path, found = make_corpus(tmp_path, 10)
    cfg = dataclasses.replace(CFG, train=(path,), check="none")
    open_train(cfg, layout(cfg), 0)
    for e in found[:3]:
        (tmp_path / e["audio_filepath"]).write_bytes(b"gone")
    return cfg, tmp_path / "quarantine.jsonl"


def test_lines_of_failed_loading_survive_restarts_without_repeats(failing):
    cfg, path = failing
    for _ in range(2):
        batches_of(open_train(cfg, layout(cfg), 0, str(path)), 20)
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(found) == 3 and all(q["loading"] for q in found)


def test_processes_list_their_own_failures_and_judge_them_together(failing):
    cfg, path = failing
    cfg = dataclasses.replace(cfg, max_bad_share=0.25, batch_multiple=2)
    loaders = []
    for process in range(2):
        train = open_train(cfg, layout(cfg), 0, str(path), process_index=process)
        for _ in zip(train.iterate(0, process, 2), range(20), strict=False):
            pass
        loaders.append(train)
    tallies = [x.tally() for x in loaders]
    assert all(0 < x[0] <= 3 for x in tallies), "each has seen some of the three"
    for file, t in zip((path, path.with_name("quarantine.1.jsonl")), tallies, strict=True):
        assert len(file.read_text().splitlines()) == t[0]
    for x in loaders:
        x.judge(*[2, 20, 0], processes=2)
        with pytest.raises(DataError, match="6 of 20 utterances could not be decoded"):
            x.judge(*[6, 20, 0], processes=2)


@pytest.mark.parametrize("threads", [0, 2])
def test_quarantine_that_cannot_be_written_stops_the_run_with_its_reason(failing, threads):
    cfg, path = failing
    train = open_train(dataclasses.replace(cfg, num_threads=threads), layout(cfg), 0, str(path))
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="quarantine.jsonl cannot be written: Is a directory"):
        batches_of(train, 40)


def test_byte_order_mark_crlf_blank_lines_and_unicode_paths_are_read(tmp_path):
    folder = tmp_path / "ünï 語 %20"
    folder.mkdir()
    name = "añ̃o 声 'x'.wav"
    soundfile.write(folder / name, noise(0.5, 1), 16000)
    soundfile.write(tmp_path / "absolute.wav", noise(0.4, 2), 16000)
    rows = [
        {"audio_filepath": name, "duration": 0.5, "text": "one"},
        {"audio_filepath": str(tmp_path / "absolute.wav"), "duration": 0.4, "text": "two"},
    ]
    path = folder / "manifest.jsonl"
    text = "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n \r\n")
    data = open_eval(CFG, str(path), layout(CFG))
    assert texts(data) == ["one", "two"] and not data.bad
    assert len(rows_of(str(path))) == 2


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (48000, 2), (16000, 8), (44100, 1)])
def test_any_rate_and_channel_count_becomes_16_khz_mono(tmp_path, rate, channels):
    soundfile.write(tmp_path / "a.wav", noise(0.6, 5, rate, channels), rate)
    path = write_lines(tmp_path / "m.jsonl", [{"audio_filepath": "a.wav", "text": "a"}])
    data = open_eval(CFG, path, layout(CFG))
    assert data.durations[0] == pytest.approx(0.6, abs=1e-3)
    [(samples, _)] = [row for _, b in data.iterate() for row in rows(b)]
    assert abs(len(samples) // 4 - 9600) <= 1


def test_nothing_usable_and_no_source_say_so(tmp_path):
    empty = write_lines(tmp_path / "empty.jsonl", [])
    gone = write_lines(tmp_path / "g.jsonl", [{"audio_filepath": "x.wav", "text": "a"}])
    for source, said in (
        (empty, "is empty"),
        (gone, "no usable utterance"),
        (str(tmp_path / "none.jsonl"), "does not exist"),
        (str(tmp_path), "directory without Shar files"),
        ((), "no data source"),
        ([(empty, -1.0)], "weight above 0"),
        ([(empty, 1.0), gone], "every data source or to none"),
    ):
        with pytest.raises(DataError, match=said):
            open_train(dataclasses.replace(CFG, train=source), layout(CFG), 0)


def test_limits_leave_out_and_do_not_count_as_bad(corpus):
    manifest, entries = corpus
    cfg = DataConfig(train=(manifest,), min_duration=0.5, max_duration=1.0, max_tokens=8)
    cfg = dataclasses.replace(cfg, min_tokens=4, max_bad_share=0.0)
    found = index.build(cfg.train, layout(cfg), cfg)
    want = [e for e in entries if 0.5 <= e["duration"] <= 1 and 4 <= len(e["text"]) <= 8]
    assert (
        [found.item(i).fields["text"] for i in range(len(found))] == [e["text"] for e in want] != []
    )
    assert found.bad_count == 0 and len(found.bad) == len(entries) - len(want)


def test_evaluation_keeps_what_limits_and_the_alphabet_leave_out(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1.0, 5), 16000)
    text = "caffè at 9 or ten"
    path = write_lines(tmp_path / "m.jsonl", [{"audio_filepath": "a.wav", "text": text}])
    cfg = dataclasses.replace(CFG, max_duration=0.5)
    data = open_eval(cfg, path, layout(cfg))
    assert texts(data) == [text]
    [(_, tokens)] = [row for _, b in data.iterate() for row in rows(b)]
    assert list(tokens) == encode("at or ten")


def test_fuzzed_lines_never_raise(tmp_path):
    rng = np.random.default_rng(0)
    good = json.dumps({"audio_filepath": "a.wav", "duration": 0.5, "text": "abc", "offset": 0.0})
    soundfile.write(tmp_path / "a.wav", noise(0.5, 5), 16000)
    lines = [good.encode()]
    for _ in range(400):
        line = bytearray(good.encode())
        for _ in range(rng.integers(1, 4)):
            line[rng.integers(len(line))] = rng.integers(256)
        lines.append(bytes(line))
    (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines))
    found = index.build(str(tmp_path / "m.jsonl"), layout(CFG), CFG)
    assert found.item(0).fields["text"] == "abc" and len(found) + len(found.bad) >= 390
