"""The audio of a piece: read from its file, tar member, segment or channel, and checked."""

import io
import os

import numpy as np

from jasr import audio
from jasr.audio import resample
from jasr.data import memory


def audio_file(piece):
    """The piece's audio as a path or open file, or as bytes where it lies inside a tar."""
    if piece.byte_start < 0:
        return piece.source
    with open(piece.source, "rb") as f:
        f.seek(piece.byte_start)
        data = f.read(piece.byte_size)
    if len(data) != piece.byte_size:
        at = f"{piece.byte_start} to {piece.byte_start + piece.byte_size}"
        raise audio.AudioError(piece.source, f"truncated tar: bytes {at} are cut off")
    return data


def read(piece, sample_rate):
    """Samples f32[S] of a seam.Piece, mono at `sample_rate`. Raises audio.AudioError.

    An array in memory is f32[S] at that rate already.
    """
    held = in_memory(piece)
    if held is not None:
        if piece.channel > 0:
            raise audio.AudioError(named(piece), f"channel {piece.channel} of 1 asked for")
        first = round(max(piece.start, 0.0) * sample_rate)
        count = round(piece.seconds * sample_rate) if piece.start >= 0 else len(held)
        return usable(held[first : first + count], named(piece))
    try:
        file = audio_file(piece)
        if piece.start < 0 and piece.channel < 0:
            return audio.read(file, sample_rate)
        seconds = piece.seconds if piece.start >= 0 else -1.0
        return read_part(file, max(piece.start, 0.0), seconds, piece.channel, sample_rate)
    except OSError as e:
        raise audio.AudioError(named(piece), e.strerror or str(e)) from e


def in_memory(piece):
    """f32[S] where a piece's recording is in memory, else None."""
    is_array = isinstance(piece.source, np.ndarray)
    return piece.source if is_array else memory.samples(piece.source)


def is_there(piece):
    """Whether a piece's recording is in memory or a file."""
    try:
        return in_memory(piece) is not None or os.path.isfile(piece.source)
    except audio.AudioError:  # held by another process
        return False


def usable(samples, name):
    """The samples of a recording or segment; AudioError where there are none or no numbers."""
    if not len(samples) or not np.isfinite(samples).all():
        raise audio.AudioError(name, "no samples, or NaN or infinite ones")
    return samples


def read_checked(piece, sample_rate, tolerance):
    """`read`, refusing audio whose length differs from the piece's by more than `tolerance` s."""
    samples = read(piece, sample_rate)
    seconds = len(samples) / sample_rate
    if piece.seconds >= 0 and abs(seconds - piece.seconds) > tolerance:
        reason = f"duration mismatch: {piece.seconds:.2f} s declared, {seconds:.2f} s decoded"
        raise audio.AudioError(named(piece), reason)
    return samples


def named(piece):
    """What an error calls a piece's source."""
    is_path = isinstance(piece.source, (str, os.PathLike))
    return os.fspath(piece.source) if is_path else f"<{type(piece.source).__name__}>"


def read_part(file, start, duration, channel, sample_rate):
    """Samples f32[S] from `start` s on for `duration` s, without decoding what comes before.

    duration -1: to the end; channel -1: the mean of all. Raises audio.AudioError.
    """
    import soundfile

    name = "a tar member" if isinstance(file, bytes) else file
    try:
        with soundfile.SoundFile(io.BytesIO(file) if isinstance(file, bytes) else file) as f:
            rate, first = f.samplerate, round(start * f.samplerate)
            if first >= f.frames:
                raise audio.AudioError(name, f"the segment starts at {start:.2f} s, after the end")
            if channel >= f.channels:
                raise audio.AudioError(name, f"channel {channel} of {f.channels} asked for")
            f.seek(first)
            count = round(duration * rate) if duration >= 0 else -1
            samples = f.read(count, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as e:
        raise audio.AudioError(name, str(e)) from e
    samples = samples.mean(axis=1) if channel < 0 else samples[:, channel]
    return resample.resample(usable(samples, name), rate, sample_rate)


def header_seconds(piece, cfg):
    """Seconds to plan the piece with where its list and its file's header agree, or (str) the
    reason why it cannot be used."""
    try:
        held = in_memory(piece)
        found = len(held) / cfg.sample_rate if held is not None else None
        seconds = audio.info(audio_file(piece))[0] if found is None else found
    except audio.AudioError as e:
        return reason_of(e)
    except OSError as e:
        return f"unreadable audio: {e.strerror or e}"
    start, duration, slack = piece.start, piece.seconds, cfg.duration_tolerance
    if start < 0:
        if duration < 0 or abs(duration - seconds) <= slack:
            return seconds
        return f"duration mismatch: {duration:.2f} s declared, the file has {seconds:.2f} s"
    end = start + duration
    if end <= seconds + slack and start < seconds:
        return min(duration, seconds - start)
    return f"duration mismatch: the segment ends at {end:.2f} s, the file at {seconds:.2f} s"


def decoded_seconds(piece, cfg):
    """Seconds of the piece after decoding all of it, or (str) the reason against it."""
    try:
        samples = read_checked(piece, cfg.sample_rate, cfg.duration_tolerance)
    except audio.AudioError as e:
        return reason_of(e)
    return len(samples) / cfg.sample_rate


def reason_of(e):
    """The quarantine reason of an AudioError."""
    if "no such file" in e.reason.lower() or e.reason.startswith("missing file"):
        return "missing file"
    if e.reason.startswith("duration mismatch"):
        return e.reason
    return f"undecodable audio: {e.reason}"
