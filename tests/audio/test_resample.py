"""Resampling against sines whose samples at any rate are known."""

import numpy as np
import pytest

from jasr.audio import augment
from jasr.audio.resample import resample, resample_stream


def sine(hz, rate, seconds=0.5):
    return np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate).astype(np.float32)


@pytest.mark.parametrize("rate_in", [8000, 11025, 22050, 44056, 44100, 48000])
def test_tones_of_the_pass_band_come_out_exactly(rate_in):
    for share in (0.01, 0.4, 0.8):
        hz = share * min(rate_in, 16000) / 2
        y = resample(sine(hz, rate_in), rate_in, 16000)
        want = sine(hz, 16000, 0.6)[: len(y)]
        np.testing.assert_allclose(y[300:-300], want[300:-300], atol=1e-4)


def test_tones_above_the_new_band_vanish():
    y = resample(sine(8400, 44100), 44100, 16000)
    assert np.abs(y[300:-300]).max() < 2e-4


@pytest.mark.parametrize(("samples", "up", "down"), [(0, 2, 3), (1, 441, 160), (1000, 160, 441)])
def test_length_is_rounded_up(samples, up, down):
    assert resample(np.ones(samples), down, up).shape == (-(-samples * up // down),)


def test_level_is_kept_and_equal_rates_change_nothing():
    x = np.random.default_rng(0).normal(size=999).astype(np.float32)
    np.testing.assert_array_equal(resample(x, 16000, 16000), x)
    level = resample(np.ones(5000), 22050, 16000)
    np.testing.assert_allclose(level[200:-200], 1, atol=1e-5)


def test_cuts_between_blocks_do_not_show():
    x = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    for rates in ((44100, 16000), (8000, 16000), (16000, 16000)):
        cuts = np.split(x, [1, 2, 700, 5000, 5000, 19_999])
        y = np.concatenate(list(resample_stream(cuts, *rates)))
        # Sums of some 200 products of samples up to 4, in another order: 200 * eps * 4.
        np.testing.assert_allclose(y, resample(x, *rates), atol=1e-4)


def test_wrong_shapes_and_rates_raise():
    with pytest.raises(ValueError, match="mono"):
        resample(np.ones((2, 100)), 8000, 16000)
    for rate in (0, -8000, 22050.5):
        with pytest.raises(ValueError, match="whole Hz"):
            resample(np.ones(100), rate, 16000)


@pytest.mark.parametrize("factor", [0.9, 1.1, 0.973])
def test_speed_moves_length_and_pitch_together(factor):
    y = augment.speed(sine(500, 16000), factor)
    assert len(y) == pytest.approx(8000 / factor, abs=2)
    want = sine(500 * factor, 16000, 0.6)[: len(y)]
    np.testing.assert_allclose(y[300:-300], want[300:-300], atol=0.06)  # 0.973 is played as 36/37


def test_speed_of_one_returns_the_samples_and_of_zero_raises():
    x = sine(500, 16000)
    np.testing.assert_array_equal(augment.speed(x, 1.0), x)
    with pytest.raises(ValueError, match="positive"):
        augment.speed(x, 0.0)
