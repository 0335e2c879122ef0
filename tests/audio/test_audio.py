"""Recordings decoded at any rate and channel count, and refused by name when they are not whole."""

import io
import json
import pickle
import re
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile

from jasr import audio
from jasr.audio import containers


def tone(seconds=1.0, rate=16000, hz=440.0):
    """A tone with a slow swell f32[S]; its decoded copies can be compared sample by sample."""
    t = np.arange(int(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * hz * t) * np.sin(np.pi * t / seconds)).astype(np.float32)


def encoded(x, rate=16000, kind="WAV", subtype=None):
    stream = io.BytesIO()
    soundfile.write(stream, x, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def mp3_without_length_header(x, rate=16000):
    """MPEG audio without its first frame, where the encoder says how long the recording is."""
    data = encoded(x, rate, "MP3")
    start = containers.mp3_start(data)
    assert containers.mp3_length(data, start)[1]
    return data[start + containers._mp3_frame(data, start)[0] :]


# ---- what decodes ------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("WAV", 1e-3), ("FLAC", 1e-3), ("OGG", 0.06), ("MP3", 0.06)]
)
def test_every_format_and_rate_decodes_to_the_same_signal(kind, rate, tolerance):
    x = audio.read(encoded(tone(rate=rate), rate, kind))
    assert x.dtype == np.float32 and x.shape == (16000,)
    np.testing.assert_allclose(x[200:-200], tone()[200:-200], atol=tolerance)


@pytest.mark.parametrize("channels", [2, 8])
def test_channels_are_averaged(channels):
    gains = np.linspace(0.1, 1.0, channels)
    x = audio.read(encoded(tone()[:, None] * gains, subtype="FLOAT"))
    np.testing.assert_allclose(x, tone() * gains.mean(), atol=1e-6)


def test_paths_bytes_and_file_objects_read_the_same(tmp_path):
    path = tmp_path / "Grüße 你好 नमस्ते.flac"
    path.write_bytes(encoded(tone(), kind="FLAC"))
    want = audio.read(path)
    with open(path, "rb") as stream:
        for source in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), stream):
            np.testing.assert_array_equal(audio.read(source), want)
    assert audio.info(path) == (1.0, 16000, 1)


def test_values_beyond_one_are_kept():
    x = audio.read(encoded(5 * tone(), subtype="FLOAT"))
    np.testing.assert_array_equal(x, 5 * tone())


def test_info_agrees_with_what_is_decoded():
    for kind, rate in (("WAV", 8000), ("FLAC", 44100), ("OGG", 16000), ("MP3", 22050)):
        data = encoded(np.stack([tone(0.7, rate)] * 2, axis=1), rate, kind)
        seconds, stored_rate, channels = audio.info(data)
        assert (stored_rate, channels) == (rate, 2)
        assert len(audio.read(data)) == pytest.approx(16000 * seconds, abs=1)


def test_blocks_are_the_whole_recording_in_pieces(monkeypatch):
    data = encoded(tone(3.0, 44100), 44100, "FLAC")
    whole = audio.read(data)
    monkeypatch.setattr("jasr.audio.files._BLOCK_SAMPLES", 10_007)
    pieces = list(audio.read_blocks(data))
    assert len(pieces) > 10
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-6)


def test_three_hours_decode_in_the_memory_of_the_result(tmp_path):
    samples = 3 * 3600 * 2000
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(samples, np.int16), 2000, "PCM_U8")
    tracemalloc.start()
    x = audio.read(path, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x.shape == (samples // 2,)
    assert peak < x.nbytes + 32 * 2**20


def test_mp3_without_length_header_decodes_to_its_end():
    # noise, then silence: the bit rate falls, and the decoder's guess is far too short
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 16000).astype(np.float32)
    x = np.concatenate([noise, np.zeros(64000, np.float32), noise])
    data = mp3_without_length_header(x)
    guess = soundfile.SoundFile(io.BytesIO(data)).frames
    assert guess < 0.8 * len(x)
    decoded = audio.read(data)
    assert len(x) - 1 <= len(decoded) < len(x) + 2304
    assert np.abs(decoded[-16000:]).max() > 0.1
    assert audio.info(data)[0] == pytest.approx(len(decoded) / 16000)


def test_recorder_to_a_pipe_may_leave_the_length_open():
    for size in (0xFFFFFFFF, 0x7FFFFFFF):
        data = bytearray(encoded(tone()))
        data[40:44] = struct.pack("<I", size)
        assert audio.read(bytes(data)).shape == (16000,)


# ---- what does not -----------------------------------------------------------------------------

BAD = {
    "empty file": b"",
    "header only": encoded(tone()[:0]),
    "cannot be decoded": b"no recording at all " * 50,
    "NaN or infinite": encoded(np.where(np.arange(16000) == 9000, np.nan, tone()), subtype="FLOAT"),
    "infinite sample": encoded(np.where(np.arange(16000) == 9, -np.inf, tone()), subtype="FLOAT"),
    "sample of 1e+30": encoded(np.where(np.arange(16000) == 9, 1e30, tone()), subtype="FLOAT"),
    "sampling rate of 7 Hz": encoded(tone(), 7),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_recording_is_refused_with_path_and_reason(reason, tmp_path):
    path = tmp_path / "utterance 7.wav"
    path.write_bytes(BAD[reason])
    with pytest.raises(audio.AudioError, match=re.escape(reason)) as error:
        audio.read(path)
    assert error.value.path == str(path)
    assert error.value.reason in str(error.value) and "\n" not in str(error.value)


def test_missing_files_directories_and_links_in_circles_are_refused(tmp_path):
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    for name, reason in (("a.wav", "no such file"), ("", "a directory"), ("loop.wav", "symbolic")):
        for function in (audio.read, audio.info):
            with pytest.raises(audio.AudioError, match=reason):
                function(tmp_path / name)


@pytest.mark.parametrize("name", ["noise.raw", "noise.au"])
def test_samples_without_a_header_are_not_guessed(name, tmp_path):
    (tmp_path / name).write_bytes(bytes(range(256)) * 10)
    with pytest.raises(audio.AudioError, match="cannot be decoded"):
        audio.read(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
        ("AIFF", "PCM_16"),
        ("AU", "PCM_16"),
        ("NIST", "PCM_16"),
        ("RF64", "PCM_16"),
        ("W64", "PCM_16"),
    ],
)
def test_cut_recording_is_never_returned_as_if_whole(kind, subtype):
    data = encoded(tone(1.5), kind=kind, subtype=subtype)
    assert len(audio.read(data)) == 24000
    for share in (0.01, 0.3, 0.6, 0.95, 0.999):
        with pytest.raises(audio.AudioError):
            audio.read(data[: int(share * len(data))])


def test_cut_is_called_a_cut():
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        data = encoded(tone(2.0), kind=kind)
        with pytest.raises(audio.AudioError, match="truncated"):
            audio.read(data[: int(0.8 * len(data))])


def test_damaged_length_does_not_ask_for_all_memory():
    data = bytearray(encoded(tone(), kind="FLAC"))
    data[21] |= 15  # STREAMINFO: 2^36 samples
    with pytest.raises(audio.AudioError, match="truncated or damaged"):
        audio.read(bytes(data))


def test_flac_without_a_length_is_named():
    data = bytearray(encoded(tone(), kind="FLAC"))
    data[21] &= 240
    data[22:26] = bytes(4)
    with pytest.raises(audio.AudioError, match="without its length"):
        audio.read(bytes(data))


def test_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(audio.AudioError("a/b.wav", "two\n lines")))
    assert (error.path, error.reason, str(error)) == ("a/b.wav", "two lines", "a/b.wav: two lines")


def test_real_recordings_have_the_length_of_their_manifest(shared_dir):
    for name in ("fixtures/manifest.jsonl", "common_voice/es.jsonl"):
        manifest = shared_dir / "data" / name
        for line in manifest.read_text().splitlines()[:25]:
            entry = json.loads(line)
            x = audio.read(manifest.parent / entry["audio_filepath"])
            assert len(x) / 16000 == pytest.approx(entry["duration"], abs=0.06)
