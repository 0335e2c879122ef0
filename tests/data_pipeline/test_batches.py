"""The stream of batches depends on the position alone: not on threads, processes or restarts."""

import dataclasses
import json
import os

import numpy as np
import pytest
import soundfile

from jasr import audio
from jasr.data import DataConfig, DataError, audio_text, open_eval, open_train
from jasr.text import TextError
from tests.corpora import encode, layout, make_corpus, noise, texts, write_lines

CFG = DataConfig(batch_duration=6.0, num_buckets=2, num_threads=0, batch_multiple=2)
RICH = dataclasses.replace(CFG, speeds=(0.9, 1.0, 1.1), concat=2, concat_duration=2.5)


def opened(manifest, cfg=RICH, seed=0, **change):
    cfg = dataclasses.replace(cfg, train=(manifest,), **change)
    return open_train(cfg, layout(cfg), seed)


def take(train, count, start=0, rank=0, world=1):
    """[(epoch, batch)] of `count` positions; the stream is closed."""
    stream = train.iterate(start, rank, world)
    out = [next(stream)[::2] for _ in range(count)]
    stream.close()
    return out


def same(a, b):
    assert len(a) == len(b)
    for (epoch, x), (other, y) in zip(a, b, strict=True):
        assert epoch == other and x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])
            assert x[key].dtype == y[key].dtype


def test_threads_do_not_change_the_stream(corpus):
    want = take(opened(corpus[0]), 30)
    same(take(opened(corpus[0], num_threads=2), 30), want)
    same(take(opened(corpus[0], num_threads=3, prefetch=1), 30), want)


def test_the_cache_does_not_change_the_stream(corpus):
    want = take(opened(corpus[0]), 30)
    train = opened(corpus[0], cache_audio=False)
    assert train.layout.cache is None
    same(take(train, 30), want)
    assert opened(corpus[0], cache_mb=0).layout.cache is None


@pytest.mark.parametrize("start", [1, 7, 23, 200])
def test_any_position_resumes_the_uninterrupted_stream(corpus, start):
    whole = take(opened(corpus[0]), start + 5) if start < 100 else None
    train = opened(corpus[0], num_threads=2)
    resumed = take(train, 5, start)
    if whole:
        same(resumed, whole[start:])
    assert [e for e, _ in resumed] == [train.epoch_of(start + i) for i in range(5)]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_read_slices_of_the_same_global_batch(corpus, world):
    change = {"batch_multiple": world}
    whole = take(opened(corpus[0], **change), 12)
    ranks = [take(opened(corpus[0], **change), 12, 0, r, world) for r in range(world)]
    joined = [
        (epoch, {k: np.concatenate([ranks[r][i][1][k] for r in range(world)]) for k in batch})
        for i, (epoch, batch) in enumerate(whole)
    ]
    same(joined, whole)


def test_a_batch_that_processes_cannot_share_says_so(corpus):
    with pytest.raises(DataError, match="batch_multiple to a multiple of 3"):
        take(opened(corpus[0], bucket_batch_size=(4,)), 1, 0, 0, 3)


def test_batches_have_the_shapes_and_types_promised(corpus):
    train = opened(corpus[0])
    for _, batch in take(train, 20):
        b, s, t = next(x for x in train.shapes if x[1] == batch["audio"].shape[1])
        assert batch["audio"].shape == (b, s) and batch["audio"].dtype == np.float32
        assert batch["tokens"].shape == (b, t) and batch["tokens"].dtype == np.int32
        for key, dtype in (("audio_len", np.int32), ("token_len", np.int32), ("index", np.int64)):
            assert batch[key].shape == (b,) and batch[key].dtype == dtype
        padding = batch["index"] < 0
        assert not batch["audio_len"][padding].any() and not batch["token_len"][padding].any()


def test_a_row_holds_the_file_and_its_text(corpus):
    manifest, entries = corpus
    folder = os.path.dirname(manifest)
    train, seen = opened(manifest, CFG), 0
    for _, batch in take(train, len(train.plan.epoch(0).bucket)):
        for row in np.flatnonzero(batch["index"] >= 0):
            entry = entries[batch["index"][row]]
            samples, _ = soundfile.read(os.path.join(folder, entry["audio_filepath"]))
            n, t = batch["audio_len"][row], batch["token_len"][row]
            np.testing.assert_array_equal(batch["audio"][row, :n], samples.astype(np.float32))
            assert batch["tokens"][row, :t].tolist() == encode(entry["text"])
            seen += 1
    assert seen == len(entries)


def test_joined_rows_hold_stretched_audio_silence_and_texts_with_a_space(corpus):
    manifest, entries = corpus
    train = opened(manifest)
    joined = 0
    for position in range(6):
        _, bucket, rows = train.plan.batch(position)
        _, _, batch = train.load(position)
        for i, row in enumerate(rows):
            at, texts, words = 0, [], np.asarray(row.words, np.uint64)
            gaps = [0, *train.layout.gaps(words)[1:]]
            for u, speed, gap in zip(row.items, train.layout.speeds(words), gaps, strict=True):
                pieces = train.index.pieces_of(u)
                samples = train.layout.pcm(pieces) * np.float32(2**-15)
                if speed != 1.0:
                    samples = audio_text.quantise(audio.speed(samples, speed)) * np.float32(2**-15)
                assert not batch["audio"][i, at : at + gap].any()
                at += gap + len(samples)
                np.testing.assert_array_equal(batch["audio"][i, at - len(samples) : at], samples)
                texts.append(entries[u]["text"])
            assert batch["audio_len"][i] == at and batch["index"][i] == row.items[0]
            t = batch["token_len"][i]
            assert batch["tokens"][i, :t].tolist() == encode(" ".join(texts))
            joined += len(texts) > 1
    assert joined


def test_speeds_are_drawn_anew_each_epoch(corpus):
    train = opened(corpus[0])
    rows = [train.plan.epoch(e).rows for e in range(2)]
    by_item = [dict(zip(r.item, train.layout.speeds(r.words), strict=True)) for r in rows]
    assert by_item[0] != by_item[1]
    assert set(by_item[0].values()) == {0.9, 1.0, 1.1}


def test_audio_a_little_longer_than_declared_is_kept_whole(tmp_path):
    entries = []
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", noise(1.08, i), 16000)
        entries.append({"audio_filepath": f"{i}.wav", "duration": 1.0, "text": "a"})
    cfg = dataclasses.replace(CFG, check="files", concat=2, concat_duration=2.4)
    cfg = dataclasses.replace(cfg, concat_gap=(0.1, 0.1), length_multiple=1, num_buckets=1)
    train = opened(write_lines(tmp_path / "m.jsonl", entries), cfg)
    _, batch = take(train, 1)[0]
    lengths = batch["audio_len"][batch["index"] >= 0]
    assert set(lengths) == {round(2.26 * 16000)} and not train.failed


def test_an_encoder_that_cuts_joined_texts_longer_does_not_overflow(corpus):
    def grows(text):
        return encode(text) * (3 if text.count(" ") > 2 else 1)

    cfg = dataclasses.replace(RICH, train=(corpus[0],), token_multiple=1)
    for _, batch in take(open_train(cfg, layout(cfg, grows), 0), 10):
        assert (batch["token_len"] <= batch["tokens"].shape[1]).all()


def test_evaluation_has_every_utterance_once_and_extra_fields_on_demand(corpus):
    manifest, entries = corpus
    data = open_eval(CFG, manifest, layout(CFG))
    assert texts(data) == [e["text"] for e in entries]
    assert data.ids == [e["audio_filepath"] for e in entries]
    assert data.item(5).fields == {k: entries[5][k] for k in ("text", "speaker")}
    for world in (1, 2):
        seen = []
        for rank in range(world):
            for _, batch in data.iterate(rank, world):
                seen += [int(i) for i in batch["index"] if i >= 0]
        assert sorted(seen) == list(range(len(entries)))
    lengths = [int(n) for _, b in data.iterate() for n in b["audio_len"]]
    assert sum(lengths) == sum(round(e["duration"] * 16000) for e in entries)


def test_segments_of_a_long_file_are_read_where_they_lie(tmp_path):
    long = noise(6.0, 3)
    soundfile.write(tmp_path / "long.flac", long, 16000)
    soundfile.write(tmp_path / "two.wav", noise(2.0, 4, channels=2), 16000)
    entries = [
        {"audio_filepath": "long.flac", "offset": o, "duration": d, "text": "a"}
        for o, d in ((0.0, 1.0), (0.5, 1.25), (4.0, 2.0), (0.0, 6.0))
    ]
    entries.append({"audio_filepath": "two.wav", "offset": 0.5, "duration": 1.0, "text": "b"})
    data = open_eval(CFG, write_lines(tmp_path / "m.jsonl", entries), layout(CFG))
    assert data.ids[1] == "long.flac@0.5+1.25" and not data.bad
    found = {}
    for _, batch in data.iterate():
        for i, x, n in zip(batch["index"], batch["audio"], batch["audio_len"], strict=True):
            found[int(i)] = x[:n]
    for i, e in enumerate(entries[:4]):
        begin, count = round(e["offset"] * 16000), round(e["duration"] * 16000)
        np.testing.assert_array_equal(found[i], long[begin : begin + count].astype(np.float32))
    both, _ = soundfile.read(tmp_path / "two.wav", dtype="float32")
    np.testing.assert_allclose(found[4], both[8000:24000].mean(axis=1), atol=2**-16)


def test_errors_of_the_encoder_are_not_swallowed(corpus):
    def broken(text):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        open_train(dataclasses.replace(CFG, train=(corpus[0],)), layout(CFG, broken), 0)
    assert issubclass(TextError, ValueError)


def test_a_finished_or_abandoned_stream_leaves_no_threads(corpus):
    import threading

    before = threading.active_count()
    take(opened(corpus[0], num_threads=2), 2)
    for _ in open_eval(dataclasses.replace(CFG, num_threads=2), corpus[0], layout(CFG)).iterate():
        pass
    for t in threading.enumerate():
        if t is not threading.current_thread() and not t.daemon:
            t.join()
    assert threading.active_count() <= before + 1


def test_real_speech_is_batched_whole(shared_dir):
    manifest = shared_dir / "data" / "an4" / "valid.jsonl"
    entries = [json.loads(line) for line in manifest.read_text().splitlines()]
    data = open_eval(CFG, str(manifest), layout(CFG))
    got = {int(i): int(n) for _, b in data.iterate() for i, n in zip(b["index"], b["audio_len"])}
    got.pop(-1, None)
    assert len(got) == len(entries) == 99
    assert all(abs(got[i] / 16000 - e["duration"]) < 0.06 for i, e in enumerate(entries))


def test_a_changed_corpus_is_another_fingerprint(tmp_path):
    a, _ = make_corpus(tmp_path, 8, seed=1)
    b, _ = make_corpus(tmp_path, 8, seed=2)
    assert opened(a).fingerprint == opened(a).fingerprint != opened(b).fingerprint
