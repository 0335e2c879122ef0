"""Transcription: exact texts and times of coded signals, any length, any batch, bad recordings."""

import io
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from jasr.audio.resample import resample, resample_stream
from jasr.decoding.ctc import ctc_greedy
from jasr.recognition.coverage import doubts
from jasr.recognition.formats import render
from jasr.recognition.recognizer import WAITING_JOBS, Recognizer, find_recordings
from jasr.seam import WindowDecoder
from jasr.text import CharTokenizer

RATE, FRAME = 16000, 640  # 25 frames a second
TOKENIZER = CharTokenizer(("<blank>", " ", "a", "b", "c", "d"))


class Levels:
    """A recogniser of loudness: a frame whose mean |sample| is id / 16 holds that token."""

    def __init__(self):
        self.traced = []

    @property
    def verbs(self):
        decoder = WindowDecoder(
            sample_rate=RATE,
            frame=FRAME,
            tokenizer=TOKENIZER,
            decode=self.decode,
            prepare=lambda variables: variables,
            window=lambda meta, trained: trained or 20.0,
            text=TOKENIZER.decode,
            totals={"updates": "updates an utterance"},
        )
        return {"transcribe": decoder}

    def decode(self, variables, batch):
        B, S = batch["audio"].shape
        self.traced.append((B, S))
        T = -(-S // FRAME)
        sound = jnp.pad(batch["audio"], ((0, 0), (0, T * FRAME - S))).reshape(B, T, FRAME)
        token = jnp.round(16 * jnp.abs(sound).mean(-1)).astype(jnp.int32)
        logit_len = -(-batch["audio_len"] // FRAME)
        out = ctc_greedy(jax.nn.one_hot(token, 6), logit_len)
        names = ("tokens", "token_len", "start_frame", "end_frame")
        updates = (batch["audio_len"] > 0).astype(jnp.int32)
        return dict(zip(names, out, strict=True), heard=logit_len, updates=updates)


def coded(ids):
    """Samples whose frames hold these token ids."""
    return np.repeat(np.array(ids, np.float32) / 16, FRAME)


def sentence(seed, frames):
    """Token ids of random words, a frame each, blanks between."""
    rng = np.random.default_rng(seed)
    ids = []
    while len(ids) < frames:
        for _ in range(rng.integers(1, 6)):
            ids += [int(rng.integers(2, 6)), *[0] * int(rng.integers(1, 4))]
        ids += [*[0] * int(rng.integers(0, 9)), 1, *[0] * int(rng.integers(2, 9))]
    return ids[:frames]


def recognizer(**settings):
    return Recognizer(Levels(), {"params": {}, "batch_stats": {}}, **settings)


def plain(result):
    return result["text"], [tuple(w.values()) for w in result["words"]]


def test_text_and_times_are_exact():
    result = recognizer().transcribe(coded([0, 2, 2, 3, 0, 1, 0, 4, 0]))
    assert result["text"] == "ab c" and result["duration"] == 0.36
    assert result["words"] == [
        {"word": "ab", "start": 0.04, "end": 0.16},
        {"word": "c", "start": 0.28, "end": 0.32},
    ]
    assert result["warnings"] == [] and result["updates"] == 1


def test_times_do_not_pass_the_end_of_the_recording():
    result = recognizer().transcribe(coded([0, 5])[:-300])
    assert result["words"][0]["end"] == result["duration"] < 0.08


@pytest.mark.parametrize("window, overlap", [(8.0, 2.0), (3.0, 0.75)])
def test_long_recordings_equal_the_whole(window, overlap):
    ids = sentence(0, 2500)
    whole = recognizer(window=200.0).transcribe(coded(ids))
    cut = recognizer(window=window, overlap=overlap).transcribe(coded(ids))
    assert plain(cut) == plain(whole)
    assert cut["duration"] == 100.0 and cut["updates"] > 9
    clock = [t for w in cut["words"] for t in (w["start"], w["end"])]
    assert clock == sorted(clock)


def test_three_hours_are_covered_to_the_last_word_in_bounded_memory(tmp_path):
    ids = [*sentence(0, 2480), *[0] * 9, 1, *[0] * 10]  # 100 s that end between two words
    piece = recognizer(window=8.0).transcribe(coded(ids))
    path = tmp_path / "three hours.flac"
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        for _ in range(108):
            file.write(coded(ids))
    tracemalloc.start()
    result = recognizer(window=30.0).transcribe(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result["duration"] == 10800.0 and result["warnings"] == []
    assert result["text"] == " ".join([piece["text"]] * 108)
    last, want = result["words"][-1], piece["words"][-1]
    assert last["end"] == pytest.approx(10700 + want["end"], abs=1e-3)
    assert peak < 10800 * RATE * 4 / 8  # f32 samples of the whole: 691 MB


def test_alone_or_in_any_batch_the_result_is_the_same_and_order_is_kept():
    recordings = [coded(sentence(i, n)) for i, n in enumerate([50, 700, 3, 50, 130, 51, 900, 20])]
    together = recognizer(window=8.0).transcribe(recordings)
    backwards = recognizer(window=8.0, batch_seconds=8.0).transcribe(recordings[::-1])
    model = recognizer(window=8.0)
    alone = [model.transcribe(x) for x in recordings]
    assert [plain(r) for r in together] == [plain(r) for r in alone]
    assert [plain(r) for r in together] == [plain(r) for r in backwards[::-1]]
    assert [r["audio_filepath"] for r in together[:2]] == ["array 0", "array 1"]


class Timeless(Levels):
    """The same without times, as a language model's text."""

    def decode(self, variables, batch):
        found = super().decode(variables, batch)
        return found | {k: jnp.full_like(found[k], -1) for k in ("start_frame", "end_frame")}


def test_a_model_without_times_gives_the_same_text_and_a_segment_a_window():
    ids = sentence(3, 700)
    want = recognizer(window=100.0).transcribe(coded(ids))["text"]
    for window, count in ((100.0, 1), (8.0, 5)):
        model = Recognizer(Timeless(), {}, window=window, overlap=2.0)
        result = model.transcribe(coded(ids))
        assert result["text"] == want and result["words"] == [] and result["warnings"] == []
        found = result["segments"]
        assert len(found) == result["coverage"]["windows"] == count
        assert found[0]["start"] == 0 and found[-1]["end"] == result["duration"] == 28.0
        assert all(a["end"] == b["start"] for a, b in zip(found, found[1:], strict=False))
        assert render(result, "srt").count("-->") == count
    (silent,) = recognizer().transcribe(np.zeros(RATE, np.float32))["warnings"]
    assert model.transcribe(np.zeros(RATE, np.float32))["warnings"] == [silent]


def test_a_model_that_does_not_transcribe_says_what_it_does():
    class Speaks:
        verbs = {"generate": None}

    with pytest.raises(ValueError, match="does not transcribe; what it does: generate"):
        Recognizer(Speaks(), {})


def test_second_recording_of_a_length_compiles_nothing():
    model = recognizer(window=8.0)
    model.transcribe([coded(sentence(0, 60))])
    before = list(model.task.traced)
    assert before == [(1, 4 * RATE)] and set(model.programs) == set(before)
    seconds = model.compile_seconds
    for seed, frames in ((1, 60), (2, 77), (3, 99), (4, 100)):
        model.transcribe([coded(sentence(seed, frames))])
    assert model.task.traced == before and model.compile_seconds == seconds


def test_many_recordings_need_few_programs():
    model = recognizer(window=8.0)
    rng = np.random.default_rng(0)
    model.transcribe([coded(sentence(i, n)) for i, n in enumerate(rng.integers(5, 500, 60))])
    assert len(model.programs) <= 6


def test_results_come_while_others_are_still_read():
    """One long recording alone in its bucket must not hold back thousands behind it."""
    read = []

    def recordings():
        yield coded(sentence(0, 150))
        for i in range(4 * WAITING_JOBS):
            read.append(i)
            yield coded([0, 2, 0])

    results = recognizer(window=8.0).each(recordings())
    assert next(results)["duration"] == 6.0
    assert len(read) <= WAITING_JOBS + 1


def test_audio_of_finished_windows_is_let_go():
    """An hour passes through in blocks; only a few windows are held."""
    model = recognizer(window=8.0, batch_seconds=32.0)
    waiting = []
    run = model._run

    def watched(bucket, items):
        waiting.append(sum(len(samples) for _, _, samples in items) / RATE)
        return run(bucket, items)

    model._run = watched
    block = coded(sentence(0, 250))
    result = next(model.each([Blocks(block, 60)]))
    assert result["duration"] == 600.0 and max(waiting) <= 32.0


class Blocks:
    """Stands for a file of repeated blocks."""

    def __init__(self, block, count):
        self.block, self.count = block, count


@pytest.fixture(autouse=True)
def blocks_as_files(monkeypatch):
    from jasr.recognition import recognizer

    plain_blocks = recognizer.Job._blocks

    def of(self, sample_rate, array_rate):
        if isinstance(self.recording, Blocks):
            recording = self.recording
            for _ in range(recording.count):
                self.seconds += len(recording.block) / sample_rate
                yield recording.block
        else:
            yield from plain_blocks(self, sample_rate, array_rate)

    monkeypatch.setattr(recognizer.Job, "_blocks", of)


def test_integer_arrays_and_other_rates_are_taken():
    soundly = coded([0, 2, 2, 2, 0, 0, 1, 0, 0, 3, 3, 3, 0])
    as_int16 = np.round(32767 * soundly).astype(np.int16)
    assert recognizer().transcribe(as_int16)["text"] == "a b"
    twice = np.repeat(soundly, 2)
    assert recognizer().transcribe([twice], sample_rate=2 * RATE)[0]["text"] == "a b"


def test_arrays_need_no_package_that_reads_files(monkeypatch):
    for name in ("soundfile", "grain", "lhotse", "jiwer", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    twice = np.repeat(coded([0, 2, 2, 2, 0]), 2)
    assert recognizer().transcribe([twice], sample_rate=2 * RATE)[0]["text"] == "a"


def test_low_rates_are_remarked_on():
    result = recognizer().transcribe([coded([0, 2, 2, 2, 0])[::2]], sample_rate=8000)[0]
    assert result["warnings"] == ["sampled at 8000 Hz: speech above 4000 Hz is missing"]


@pytest.mark.parametrize(
    "bad, why",
    [
        (np.zeros((2, 100), np.float32), "shape"),
        (np.zeros(0, np.float32), "shape"),
        (np.array([0.1, np.nan], np.float32), "NaN"),
        ("nowhere/missing.wav", "no such file"),
    ],
)
def test_bad_recordings_say_why_and_leave_the_others_alone(bad, why):
    with pytest.warns(UserWarning, match="not transcribed"):
        first, second = recognizer().transcribe([bad, coded([0, 2, 0])])
    assert why in first["error"] and first["warnings"] == [first["error"]]
    assert first["text"] == "" and first["words"] == []
    assert second["text"] == "a" and "error" not in second


def test_silence_is_named():
    (warning,) = recognizer().transcribe(np.zeros(RATE, np.float32))["warnings"]
    assert "silent" in warning


def test_sound_without_words_is_named():
    noise = 0.01 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    (warning,) = recognizer().transcribe(noise)["warnings"]
    assert warning.startswith("no words found although 1.0 s")


def test_milliseconds_of_noise_are_not_called_silent():
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE // 100).astype(np.float32)
    result = recognizer().transcribe(noise)
    assert not any("silent" in warning for warning in result["warnings"])
    assert str(recognizer().transcribe(noise[:1])["coverage"]["seconds"])[0] != "-"


def test_words_in_silence_and_holes_beside_words_of_no_length_are_named():
    (warning,) = doubts([{"start": 1.0, "end": 1.1}], np.full(100, -90.0), 2.0)
    assert warning.startswith("words found although the recording is silent")
    found = [{"start": 1.0, "end": 1.04}]
    (warning,) = doubts(found, np.full(3000, -20.0), 60.0)
    assert warning.startswith("no words between 1.0 and 60.0 s")


def test_a_long_loud_stretch_without_words_is_named():
    clicks = np.where(np.arange(5 * RATE) % 25, 0.0, 0.7).astype(np.float32)  # loud, no token
    speech = coded(sentence(0, 100))
    model = recognizer(window=30.0)
    result = model.transcribe(np.concatenate([speech, clicks, speech]))
    assert any("no words between" in w for w in result["warnings"]), result["warnings"]
    quiet = model.transcribe(np.concatenate([speech, 0.001 * clicks, speech]))
    assert quiet["warnings"] == []


def write(path, samples, rate=RATE, **kwargs):
    soundfile = pytest.importorskip("soundfile")
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **kwargs)
    return path


def test_files_of_any_kind_channels_and_names_are_read(tmp_path):
    sound = coded([0, 2, 2, 2, 0, 0, 1, 0, 0, 3, 3, 3, 0])
    stereo = np.stack([sound, sound], axis=1)
    paths = [
        write(tmp_path / "ünïcode dir" / "नमस्ते 1.wav", sound),
        write(tmp_path / "b.flac", stereo),
        write(tmp_path / "c.wav", np.repeat(sound, 3), 48000),
        write(tmp_path / "d.wav", np.tile(sound[:, None], (1, 8)), subtype="FLOAT"),
    ]
    results = recognizer().transcribe(paths)
    assert [r["text"] for r in results] == ["a b"] * 4
    assert [r["audio_filepath"] for r in results] == [str(p) for p in paths]
    assert results[1]["warnings"] == [] and results[3]["warnings"] == ["8 channels were averaged"]
    assert len({str(r["words"]) for r in results}) == 1


def test_channels_that_cancel_are_not_averaged_to_silence(tmp_path):
    sound = coded([0, 2, 2, 2, 0, 0, 1, 0, 0, 3, 3, 3, 0])
    path = write(tmp_path / "a.wav", np.stack([0.9 * sound, -sound], axis=1), subtype="FLOAT")
    result = recognizer().transcribe(path)
    assert result["text"] == recognizer().transcribe(-sound)["text"]
    (warning,) = result["warnings"]
    assert warning.startswith("the channels cancel each other out from 0.0 s on")
    assert "channel 1 is used" in warning


def test_a_channel_once_chosen_is_kept_and_silent_ones_do_not_cancel(tmp_path, monkeypatch):
    from jasr import audio

    monkeypatch.setattr("jasr.audio.files._BLOCK_SAMPLES", 2000)
    sound = 0.3 * np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    path, notes = write(tmp_path / "a.wav", np.stack([sound, -sound], axis=1)), []
    got = np.concatenate(list(audio.read_blocks(path, notes=notes)))
    assert len(notes) == 1
    np.testing.assert_allclose(np.abs(got @ sound), sound @ sound, rtol=1e-3)  # one sign throughout
    one = np.zeros((8000, 16), np.float32)
    one[:, 3] = sound
    path, notes = write(tmp_path / "b.wav", one, subtype="FLOAT"), []
    np.testing.assert_allclose(
        np.concatenate(list(audio.read_blocks(path, notes=notes))), sound / 16, atol=1e-6
    )
    assert notes == []


def test_broken_files_do_not_stop_the_others(tmp_path):
    good = write(tmp_path / "good.wav", coded([0, 2, 0]))
    cut = tmp_path / "cut.wav"
    cut.write_bytes(good.read_bytes()[:1000])
    empty = tmp_path / "empty.wav"
    empty.write_bytes(b"")
    with pytest.warns(UserWarning):
        results = recognizer().transcribe([cut, good, empty, tmp_path])
    assert [bool(r.get("error")) for r in results] == [True, False, True, True]
    assert all(r["audio_filepath"] in r["error"] for r in results if "error" in r)


def test_blocks_of_a_file_join_to_what_reading_gives(tmp_path, monkeypatch):
    from jasr import audio

    monkeypatch.setattr("jasr.audio.files._BLOCK_SAMPLES", 5000)
    sound = 0.3 * np.random.default_rng(0).standard_normal(44100).astype(np.float32)
    path = write(tmp_path / "x.wav", sound, 44100)
    blocks = list(audio.read_blocks(path))
    assert len(blocks) > 5
    np.testing.assert_allclose(np.concatenate(blocks), audio.read(path), atol=1e-6)


@pytest.mark.parametrize("rate", [7350, 8000, 11025, 16000, 22050, 44100, 96000])
def test_resampling_in_blocks_equals_resampling_at_once(rate):
    rng = np.random.default_rng(rate)
    sound = rng.standard_normal(rate + 17).astype(np.float32)
    for cuts in ([], np.sort(rng.integers(0, len(sound), 6))):
        blocks = resample_stream(np.split(sound, cuts), rate, RATE)
        np.testing.assert_allclose(
            np.concatenate(list(blocks)), resample(sound, rate, RATE), atol=1e-5
        )


def test_an_array_of_channels_is_refused():
    for shape in ((100, 2), (2, 100)):
        with pytest.raises(ValueError, match="one channel"):
            recognizer().transcribe(np.zeros(shape, np.float32))


def test_directories_give_their_recordings_sorted_with_names(tmp_path):
    for name in ("d/b.WAV", "d/sub/a.flac", "d/notes.txt", "x.wav", "e/x.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "none").mkdir()
    found, problems = find_recordings(
        [tmp_path / "d", tmp_path / "x.wav", tmp_path / "e", tmp_path / "none"]
    )
    assert [p.name for p, _ in found] == ["b.WAV", "a.flac", "x.wav", "x.wav"]
    assert [n for _, n in found[:2]] == ["b", "sub/a"]
    assert len({n for _, n in found}) == 4
    assert len(problems) == 1 and "no recordings" in problems[0]


def test_file_objects_hold_recordings_too():
    soundfile = pytest.importorskip("soundfile")
    stream = io.BytesIO()
    soundfile.write(stream, coded([0, 2, 2, 0]), RATE, format="WAV")
    stream.seek(0)
    result = recognizer().transcribe(stream)
    assert result["text"] == "a" and result["audio_filepath"] == "BytesIO"
