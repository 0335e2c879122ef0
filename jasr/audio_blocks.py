"""Recordings of any length in blocks of samples, for readers that must not hold the whole."""

from fractions import Fraction

import numpy as np

from jasr import audio
from jasr.resample import ZEROS, resample

_REACH = ZEROS + 8  # periods of the lower rate that an output sample may look ahead and back


def read_blocks(file, sample_rate=16000):
    """Yields what `audio.read` returns in one piece as blocks f32[*] of about a minute or less.

    Raises AudioError as `audio.read` does, at the latest where the damage lies.
    """
    name = audio._name(file)
    sound, length = audio._open(file, name)
    with sound:
        blocks = audio._blocks(sound, length, name)
        yield from resample_stream(blocks, sound.samplerate, sample_rate)


def resample_stream(blocks, rate_in, rate_out):
    """Yields the samples of `resample` of the joined blocks, about a block at a time."""
    if rate_in == rate_out:
        yield from blocks
        return
    ratio = Fraction(int(rate_out), int(rate_in))
    up, down = ratio.numerator, ratio.denominator
    reach = -(-_REACH * max(1, -(-down // up)) // down) * down  # input samples, whole periods
    kept, start, done = np.zeros(0, np.float32), 0, 0  # `kept` begins at input sample `start`
    for block in blocks:
        kept = np.concatenate([kept, block])
        ready = (start + len(kept) - reach) // down * down
        if ready > done:
            out = resample(kept, rate_in, rate_out)
            yield out[(done - start) * up // down : (ready - start) * up // down]
            done = ready
            drop = max(0, done - reach - start)
            kept, start = kept[drop:], start + drop
    yield resample(kept, rate_in, rate_out)[(done - start) * up // down :]
