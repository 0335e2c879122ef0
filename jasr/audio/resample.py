"""Resampling on the host: band-limited interpolation as small matrix products, numpy alone.

One method everywhere, so that features do not depend on which optional library a machine has.
Outputs come in rows of a fixed number of samples; every row reads its window of the input with the
same weights, so a recording is a strided view times a constant matrix.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction

import numpy as np

ZEROS = 32  # zero crossings of the sinc on each side
ROLLOFF = 0.93  # -6 dB point as a share of the lower Nyquist frequency
BETA = 8.0  # Kaiser window: about 80 dB beyond the lower Nyquist frequency
_GROUP = 32  # outputs that share one window of the input
_SINGLE_THREAD = 1 << 18  # multiply-adds of one product: below it BLAS starts no threads


def resample(x, rate_in: int, rate_out: int) -> np.ndarray:
    """Samples f32[ceil(S * rate_out / rate_in)] of x f32[S] at another sampling rate.

    Kaiser-windowed sinc (Smith, "Digital audio resampling"), zeros outside the recording, gain 1 at
    0 Hz. Rates are whole Hz. Raises ValueError for an array that is not one-dimensional.
    """
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim != 1:
        raise ValueError(f"resample needs mono samples of shape [S], got {x.shape}")
    up, down = _ratio(rate_in, rate_out)
    return collect(resample_stream([x], rate_in, rate_out), -(-len(x) * up // down))


def resample_stream(
    blocks: Iterable[np.ndarray], rate_in: int, rate_out: int
) -> Iterator[np.ndarray]:
    """Yields `resample` of the joined blocks f32[*], about a block at a time."""
    up, down = _ratio(rate_in, rate_out)
    if up == down:
        yield from blocks
        return
    groups, before, reach, step = _filters(up, down)
    row = sum(weights.shape[1] for _, weights in groups)  # outputs a row
    buffer = np.zeros(before, np.float32)  # input from `before` samples ahead of the next row
    seen = done = 0
    for block in blocks:
        seen += len(block)
        buffer = np.concatenate([buffer, block])
        rows = max(0, (len(buffer) - reach) // step + 1)
        if rows:
            yield _rows(groups, buffer, rows, step, row)
            buffer, done = buffer[rows * step :], done + rows * row
    rest = -(-seen * up // down) - done
    rows = -(-max(0, rest) // row)
    buffer = np.pad(buffer, (0, max(0, rows * step + reach - len(buffer))))
    if rest > 0:
        yield _rows(groups, buffer, rows, step, row)[:rest]


def collect(blocks: Iterable[np.ndarray], expected: int) -> np.ndarray:
    """The joined blocks f32[S], copied once if there are `expected` samples or fewer."""
    out, done = np.empty(expected, np.float32), 0
    for block in blocks:
        end = done + len(block)
        if end > len(out):
            out = np.concatenate([out, np.empty(max(end - len(out), len(out) // 2), np.float32)])
        out[done:end] = block
        done = end
    return out[:done]


def _ratio(rate_in, rate_out) -> tuple[int, int]:
    if min(rate_in, rate_out) <= 0 or rate_in != int(rate_in) or rate_out != int(rate_out):
        raise ValueError(f"sampling rates must be positive whole Hz, got {rate_in} and {rate_out}")
    ratio = Fraction(int(rate_out), int(rate_in))
    return ratio.numerator, ratio.denominator


@functools.lru_cache(maxsize=64)
def _filters(up: int, down: int):
    """((start, weights f32[W, G]), ...), samples before a row, input a row reads, input step.

    Output j of a row sits at input position j * down / up and sees `half` samples on each side.
    """
    cutoff = ROLLOFF * min(1.0, up / down)
    half = math.ceil(ZEROS / cutoff)
    periods = -(-_GROUP // up)
    outputs = periods * up
    groups = []
    for first in range(0, outputs, _GROUP):
        j = np.arange(first, min(first + _GROUP, outputs))
        start, stop = first * down // up - half + 1, int(j[-1]) * down // up + half + 1
        at = np.arange(start, stop)
        distance = (j[None, :] * down - at[:, None] * up) / up  # exact integers over up
        weights = np.sinc(cutoff * distance) * _kaiser(distance / half)
        weights /= weights.sum(0)
        groups.append((start + half - 1, weights.astype(np.float32)))
    reach = max(start + len(weights) for start, weights in groups)
    return tuple(groups), half - 1, reach, periods * down


def _kaiser(u: np.ndarray) -> np.ndarray:
    inside = np.abs(u) < 1
    return np.where(inside, np.i0(BETA * np.sqrt(np.where(inside, 1 - u * u, 0))), 0) / np.i0(BETA)


def _rows(groups, buffer: np.ndarray, rows: int, step: int, row: int) -> np.ndarray:
    """f32[rows * row]: for group (start, w), row r is buffer[start + r * step :][:W] @ w."""
    out = np.empty((rows, row), np.float32)
    column = 0
    for start, weights in groups:
        width, count = weights.shape
        chunk = max(1, _SINGLE_THREAD // (width * count))
        for r in range(0, rows, chunk):
            n = min(chunk, rows - r)
            view = np.lib.stride_tricks.as_strided(
                buffer[start + r * step :], (n, width), (step * buffer.itemsize, buffer.itemsize)
            )
            out[r : r + n, column : column + count] = np.ascontiguousarray(view) @ weights
        column += count
    return out.reshape(-1)
