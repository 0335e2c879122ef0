"""The audio of an index row: read from its file, tar member, segment or channel, and checked."""

import io

import numpy as np

from jasr import audio


def audio_file(index, row):
    """The row's audio as a path, or as bytes where it lies inside a tar."""
    path = index.path(row)
    if index.byte_start[row] < 0:
        return path
    with open(path, "rb") as f:
        f.seek(int(index.byte_start[row]))
        data = f.read(int(index.byte_size[row]))
    if len(data) != index.byte_size[row]:
        raise audio.AudioError(path, f"truncated tar: the member of {index.id(row)} is cut off")
    return data


def read(index, row, sample_rate):
    """Samples f32[S] of a row, mono at `sample_rate`. Raises audio.AudioError."""
    start, channel = float(index.start[row]), int(index.channel[row])
    try:
        file = audio_file(index, row)
        if start < 0 and channel < 0:
            return audio.read(file, sample_rate)
        duration = float(index.duration[row]) if start >= 0 else -1.0
        return read_part(file, max(start, 0.0), duration, channel, sample_rate)
    except OSError as e:
        raise audio.AudioError(index.path(row), e.strerror or str(e)) from e


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
    if not len(samples) or not np.isfinite(samples).all():
        raise audio.AudioError(name, "no samples, or NaN or infinite ones, in the segment")
    return audio.resample(samples, rate, sample_rate)


def header_seconds(index, row, cfg):
    """Seconds of the row's audio by its header, or (str) the reason why it cannot be used."""
    try:
        seconds = audio.info(audio_file(index, row))[0]
    except audio.AudioError as e:
        return reason_of(e)
    except OSError as e:
        return f"unreadable audio: {e.strerror or e}"
    return agreed_seconds(float(index.start[row]), float(index.duration[row]), seconds, cfg)


def decoded_seconds(index, row, cfg):
    """Seconds of the row's audio after decoding all of it, or (str) the reason against it."""
    try:
        seconds = len(read(index, row, cfg.sample_rate)) / cfg.sample_rate
    except audio.AudioError as e:
        return reason_of(e)
    declared = float(index.duration[row])
    if abs(seconds - declared) > cfg.duration_tolerance:
        return f"duration mismatch: {declared:.2f} s declared, {seconds:.2f} s decoded"
    return seconds


def agreed_seconds(start, duration, seconds, cfg):
    """Seconds to plan with where list and file (of `seconds`) agree, else (str) the reason."""
    slack = cfg.duration_tolerance
    if start >= 0:
        if start + duration <= seconds + slack and start < seconds:
            return min(duration, seconds - start)
        return (
            f"duration mismatch: the segment ends at {start + duration:.2f} s, "
            f"the file at {seconds:.2f} s"
        )
    if duration >= 0 and abs(duration - seconds) > slack:
        return f"duration mismatch: {duration:.2f} s declared, the file has {seconds:.2f} s"
    return seconds


def reason_of(e):
    """The quarantine reason of an AudioError."""
    if "no such file" in e.reason.lower() or e.reason.startswith("missing file"):
        return "missing file"
    if e.reason.startswith("duration mismatch"):
        return e.reason
    return f"undecodable audio: {e.reason}"
