"""Recordings as arrays: files decoded to mono samples at one rate, or a named reason why not.

Files are decoded on the host with soundfile, which is imported where it is used.
"""

from __future__ import annotations

import io
import mmap
import os

import numpy as np

from jasr.audio import containers
from jasr.audio.resample import collect, resample_stream

_BLOCK_SAMPLES = 1 << 20  # decoded at a time, all channels together
_LONGEST_TRUSTED = 1 << 28  # samples: a damaged header must not ask for all memory at once
_RATES = (1_000, 1_000_000)  # Hz; anything else is a damaged header
_CANCELLED = 0.02  # of the power of a mean of unrelated channels: less is left where they cancel
_LOUDEST = 2.0**31  # 32-bit PCM kept as floats; beyond it squares overflow f32


class AudioError(ValueError):
    """A recording that cannot be used: `path` says which, `reason` why, in one line."""

    def __init__(self, path, reason: str):
        self.path = str(path)
        self.reason = " ".join(str(reason).split())
        super().__init__(f"{self.path}: {self.reason}")

    def __reduce__(self):  # keeps both fields when a worker process hands the error on
        return type(self), (self.path, self.reason)


def read(file, sample_rate: int = 16000) -> np.ndarray:
    """Mono samples f32[S] of a recording at `sample_rate` Hz: the mean of its channels, resampled;
    of channels that cancel each other the loudest.

    file: path, bytes or binary file object (read to its end), in any format of libsndfile (WAV,
    FLAC, OGG, MP3, AIFF, SPHERE ...). Values beyond ±1 are kept. A path is decoded in blocks, so
    that memory stays near the size of the result.
    Raises AudioError for a missing, truncated, empty or undecodable file and for NaN or infinite
    samples: a part of a recording is never returned as if it were all.
    """
    sound, length, name = _open(file)
    expected = -(-min(length, _LONGEST_TRUSTED) * sample_rate // sound.samplerate)
    with sound:
        blocks = _blocks(sound, length, name)
        return collect(resample_stream(blocks, sound.samplerate, sample_rate), expected)


def read_blocks(file, sample_rate: int = 16000, notes=None):
    """Yields what `read` returns as blocks f32[*] of at most a minute or so, for long recordings.

    To a list `notes` a remark is added where channels could not be averaged. Raises AudioError as
    `read` does, at the latest where the damage lies.
    """
    sound, length, name = _open(file)
    with sound:
        blocks = _blocks(sound, length, name, notes)
        yield from resample_stream(blocks, sound.samplerate, sample_rate)


def info(file) -> tuple[float, int, int]:
    """(seconds, sampling rate in Hz, channels) of a recording, decoding nothing.

    Takes what `read` takes and raises AudioError where the container alone shows that `read` would.
    """
    sound, length, _ = _open(file)
    with sound:
        return length / sound.samplerate, sound.samplerate, sound.channels


def _open(file):
    """(open soundfile.SoundFile, samples a channel that it must hold, name of the recording)."""
    if not isinstance(file, str | os.PathLike):
        name = str(getattr(file, "name", f"<{type(file).__name__}>"))
        data = bytes(file) if isinstance(file, bytes | bytearray | memoryview) else file.read()
        return _open_data(data, io.BytesIO(data), name)
    name = os.fspath(file)
    if os.path.isdir(file):
        raise AudioError(name, "a directory, not a recording")
    try:
        with open(file, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:  # which cannot be mapped
                return _open_data(b"", None, name)
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _open_data(data, name, name)
    except FileNotFoundError as error:
        raise AudioError(name, "no such file") from error
    except OSError as error:
        raise AudioError(name, f"cannot be read: {error.strerror or error}") from error


def _open_data(data, source, name: str):
    import soundfile

    if len(data) == 0:
        raise AudioError(name, "empty file (0 bytes)")
    if reason := containers.shortage(data):
        raise AudioError(name, reason)
    try:
        sound = soundfile.SoundFile(source)
        length = sound.frames
        if sound.format == "MP3" and (start := containers.mp3_start(data)) >= 0:
            counted, says_so = containers.mp3_length(data, start)
            if not says_so and length < counted - 2304:  # the guess missed more than two frames
                sound.close()
                whole = containers.mp3_with_length(data, start, counted)
                sound = soundfile.SoundFile(io.BytesIO(whole))
            length = sound.frames if says_so else min(counted, sound.frames)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: *.raw, which has no header
        cause = getattr(error, "error_string", "raw samples without a header")
        raise AudioError(name, f"cannot be decoded: {cause}") from error
    reason, rate = "", sound.samplerate
    if sound.format == "RAW":  # libsndfile's guess for an unknown file named *.au or *.snd
        reason = "cannot be decoded: Format not recognised."
    elif length <= 0:
        reason = "header only: no samples"
    elif not _RATES[0] <= rate <= _RATES[1]:
        reason = f"sampling rate of {rate} Hz is outside {_RATES[0]} to {_RATES[1]}"
    if reason:
        sound.close()
        raise AudioError(name, reason)
    return sound, length, name


def _mixed(samples, chosen):
    """(mono f32[S], None) of channels f32[S, C]; where they cancel out (one of them, its number).

    chosen: the channel of the block before, kept unless another one is ten times as loud.
    """
    mono = samples.mean(axis=1)
    with np.errstate(all="ignore"):  # what is not finite is named later
        power, left = np.square(samples).mean(axis=0), np.square(mono).mean()
        unrelated = power.sum() / len(power) ** 2  # what is left of channels that differ
    if not left < _CANCELLED * unrelated:
        return mono, None
    if chosen is None or 10 * power[chosen] < power.max():
        chosen = int(power.argmax())
    return samples[:, chosen], chosen


def _blocks(sound, length: int, name: str, notes=None):
    """Yields a recording as mono blocks f32[*]; raises where it ends before its length."""
    import soundfile

    block, decoded, channel = max(1, _BLOCK_SAMPLES // sound.channels), 0, None
    while True:
        try:
            samples = sound.read(block, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            stop = min(decoded + block, length)
            raise AudioError(
                name, f"truncated or damaged before sample {stop} of {length}"
            ) from error
        if not len(samples):
            break
        mono = samples[:, 0]
        if samples.shape[1] > 1:
            mono, used = _mixed(samples, channel)
            channel = channel if used is None else used
            if used is not None and notes is not None:
                notes.append(
                    f"the channels cancel each other out from {decoded / sound.samplerate:.1f} s "
                    f"on (opposite phases): where they do, channel {channel} is used"
                )
                notes = None  # once
        peak = np.abs(mono).max()
        if not peak <= _LOUDEST:
            what = f"sample of {peak:g}" if np.isfinite(peak) else "NaN or infinite sample"
            raise AudioError(name, f"{what} between samples {decoded} and {decoded + len(mono)}")
        decoded += len(samples)
        yield mono
    if decoded < length:
        raise AudioError(name, f"truncated: {decoded} of {length} samples decoded")
