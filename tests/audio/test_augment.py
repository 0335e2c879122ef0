"""Augmentation: NeMo's masks to the cell, one key per utterance, pads untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr.audio import augment
from jasr.audio.augment import SpecAugmentConfig, WaveAugmentConfig

spec_augment = jax.jit(augment.spec_augment, static_argnums=3)
augment_waveform = jax.jit(augment.augment_waveform, static_argnums=3)
LENGTHS = np.array([300, 180, 7, 0], np.int32)
KEYS = augment.row_keys(jax.random.key(5), [11, 4, 7, -1])


def ones(batch=4, time=300, bins=80):
    """Mel f32[B, T, F] of ones, zero after LENGTHS, so that masks show as zeros."""
    mel = np.ones((batch, time, bins), np.float32)
    return mel * (np.arange(time) < LENGTHS[:batch, None])[..., None]


def noise_mel(seed=0):
    return (ones() * np.random.default_rng(seed).normal(3, 1, (4, 300, 80))).astype(np.float32)


def bands(row):
    """[(start, width)] of the runs of True in bool[n]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2] - edges[::2], strict=True))


# ---- SpecAugment -------------------------------------------------------------------------------


def test_masks_are_nemos_for_the_same_draws(goldens):
    golden = np.load(goldens / "audio" / "specaugment.npz")
    shape = golden["shape"]
    want = np.unpackbits(golden["masked"])[: np.prod(shape)].reshape(shape).astype(bool)
    length = golden["length"].astype(np.float32)[:, None]
    time = augment.bands(
        golden["time_width_u"], golden["time_start_u"], np.float32(0.05) * length, length, shape[2]
    )
    freq = augment.bands(golden["freq_width_u"], golden["freq_start_u"], 27.0, 80.0, shape[1])
    np.testing.assert_array_equal(time[:, None, :] | freq[:, :, None], want)
    draws = [golden[f"{axis}_{what}_u"] for axis in ("time", "freq") for what in ("width", "start")]
    mel_shape = (shape[0], shape[2], shape[1])
    config = SpecAugmentConfig(style="nemo")
    masked = jax.jit(augment.masks, static_argnums=(0, 3))
    got = masked(mel_shape, golden["length"], draws, config)
    np.testing.assert_array_equal(got, want.transpose(0, 2, 1))


@pytest.mark.parametrize("time_width", [0.05, 1.0, 30.0, 250.0])
def test_nemo_style_is_torchs_arithmetic_for_any_width_and_length(time_width):
    torch = pytest.importorskip("torch")
    config = SpecAugmentConfig(style="nemo", time_width=time_width, time_masks=4, mask_value=-2.0)
    lengths = np.array([300, 180, 7, 0] * 8, np.int32)
    mel = np.random.default_rng(2).normal(size=(32, 300, 80)).astype(np.float32)
    keys = augment.row_keys(jax.random.key(1), np.arange(32))
    draws = jax.vmap(lambda k: jax.random.uniform(k, (13,)))(keys)
    u = torch.tensor(np.array(draws)[:, 1:])
    length = torch.tensor(lengths, dtype=torch.long)[:, None]
    widest = torch.clamp(time_width * length, max=300) if time_width <= 1 else int(time_width)
    masked = torch.zeros(32, 300, 80, dtype=torch.bool)
    for width, start, extent, size, view in (
        ((u[:, :4] * widest).long(), u[:, 4:8], length, 300, lambda x: x[:, :, None]),
        ((u[:, 8:10] * 27).long(), u[:, 10:], 80, 80, lambda x: x[:, None, :]),
    ):
        start = (start * (extent - width)).long()[..., None]
        at = torch.arange(size)
        masked |= view(((at >= start) & (at < start + width[..., None])).any(1))
    got = spec_augment(mel, lengths, keys, config)
    np.testing.assert_array_equal(got, np.where(masked.numpy(), np.float32(-2.0), mel))


def test_nemo_style_masks_as_often_as_nemo_does(shared_dir):
    golden = np.load(shared_dir / "goldens" / "nemo" / "specaugment.npz")
    lengths = np.tile(golden["det/length"], 400).astype(np.int32)
    keys = augment.row_keys(jax.random.key(0), np.arange(800))
    out = spec_augment(jnp.ones((800, 300, 80)), lengths, keys, SpecAugmentConfig(style="nemo"))
    masked = np.asarray(out == 0).reshape(400, 2, 300, 80).mean(0)
    for axis, name in ((2, "time"), (1, "freq")):
        want = golden[f"adaptive/mask_frequency_by_{name}"]  # of 400 runs
        np.testing.assert_allclose(masked.mean(axis), want, atol=0.1)
        np.testing.assert_allclose(masked.mean(axis).mean(1), want.mean(1), atol=0.015)


@pytest.mark.parametrize(("time_width", "widest"), [(0.05, 14), (0.2, 59), (30.0, 29), (1e4, 299)])
def test_time_masks_stay_inside_their_widths_and_the_utterance(time_width, widest):
    config = SpecAugmentConfig(freq_masks=0, time_masks=1, time_width=time_width)
    mel = np.ones((64, 300, 2), np.float32)
    keys = augment.row_keys(jax.random.key(0), np.arange(64))
    lengths = np.where(np.arange(64) % 2, 180, 300)
    masked = np.asarray(spec_augment(mel, lengths, keys, config))[..., 0] == 0
    widths = []
    for row, n in zip(masked, lengths, strict=True):
        assert not row[n:].any()
        widths += [width for _, width in bands(row)]
    assert max(widths) <= widest and max(widths) >= widest // 2
    assert len(bands(masked[0])) <= 1


def test_frequency_masks_cover_whole_bins_of_valid_frames():
    config = SpecAugmentConfig(freq_masks=2, freq_width=10, time_masks=0)
    out = np.asarray(spec_augment(ones(), LENGTHS, KEYS, config))
    for row, n in zip(out[:3], LENGTHS, strict=False):
        masked = row[:n] == 0
        assert (masked == masked[:1]).all()
        assert masked[0].sum() <= 2 * 9


def test_scale_ramps_masks_and_warp_in():
    config = SpecAugmentConfig(warp=0.2, time_width=0.2)
    mel = noise_mel()
    np.testing.assert_array_equal(spec_augment(mel, LENGTHS, KEYS, config, 0.0), mel)
    masked = [
        np.mean(np.asarray(spec_augment(ones(), LENGTHS, KEYS, config, s))[:2] == 0)
        for s in (0.3, 1.0)
    ]
    assert np.mean(ones()[:2] == 0) < masked[0] < masked[1]


def test_mean_fill_is_each_bins_mean_over_the_utterance():
    mel = noise_mel()
    config = SpecAugmentConfig(fill="mean")
    zero = np.asarray(spec_augment(mel, LENGTHS, KEYS, SpecAugmentConfig()))
    mean = np.asarray(spec_augment(mel, LENGTHS, KEYS, config))
    masked = (zero[1, :180] == 0) & (mel[1, :180] != 0)
    assert masked.any()
    want = np.broadcast_to(mel[1, :180].mean(0), masked.shape)
    np.testing.assert_allclose(mean[1, :180][masked], want[masked], rtol=1e-5)
    np.testing.assert_array_equal(mean[1, :180][~masked], mel[1, :180][~masked])


def test_warp_is_linear_interpolation_between_bins():
    mel = noise_mel()
    factor = np.array([1.1, 0.9, 1.0, 1.0], np.float32)
    out = np.asarray(augment.warp_mel(mel, factor))
    for row in range(2):
        source = np.clip(np.arange(80) * factor[row], 0, 79)
        want = np.stack([np.interp(source, np.arange(80), frame) for frame in mel[row]])
        np.testing.assert_allclose(out[row], want, atol=2e-4)
    np.testing.assert_array_equal(out[2:], mel[2:])


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_pad_frames_stay_zero_and_the_utterance_alone_gets_the_same(fill):
    config = SpecAugmentConfig(fill=fill, warp=0.1)
    mel = noise_mel()
    out = np.asarray(spec_augment(mel, LENGTHS, KEYS, config))
    assert np.isfinite(out).all()
    assert (out * (np.arange(300) >= LENGTHS[:, None])[..., None] == 0).all()
    assert np.abs(out[:2] - mel[:2]).max() > 0.1
    alone = spec_augment(mel[1:2, :200], LENGTHS[1:2], KEYS[1:2], config)
    np.testing.assert_allclose(alone[0], out[1, :200], atol=1e-5)


def test_unknown_fill_raises():
    with pytest.raises(ValueError, match="fill"):
        augment.spec_augment(ones(), LENGTHS, KEYS, SpecAugmentConfig(fill="noise"))


@pytest.mark.parametrize(
    "fields",
    [
        dict(style="Nemo"),
        dict(style="nemo", warp=0.1),
        dict(style="nemo", fill="mean"),
        dict(mask_value=-2.0),
    ],
)
def test_settings_of_another_style_are_refused(fields):
    with pytest.raises(ValueError, match="spec_augment|SpecAugmentConfig.style must be"):
        SpecAugmentConfig(**fields)


# ---- waveforms ---------------------------------------------------------------------------------

SAMPLES = np.array([16000, 9000, 160, 0], np.int32)


def wave(seed=0):
    audio = np.random.default_rng(seed).normal(0, 0.1, (4, 16000))
    return (audio * (np.arange(16000) < SAMPLES[:, None])).astype(np.float32)


def test_noise_has_the_drawn_ratio_to_the_signal():
    config = WaveAugmentConfig(noise_share=1.0, snr_low_db=12.0, snr_high_db=12.0)
    added = np.asarray(augment_waveform(wave(), SAMPLES, KEYS, config)) - wave()
    for row, n in zip(range(2), SAMPLES, strict=False):
        ratio = np.mean(wave()[row, :n] ** 2) / np.mean(added[row, :n] ** 2)
        assert 10 * np.log10(ratio) == pytest.approx(12.0, abs=1.0)


def test_gain_is_one_factor_within_its_range():
    config = WaveAugmentConfig(gain_db=6.0)
    out = np.asarray(augment_waveform(wave(), SAMPLES, KEYS, config))
    factors = [float(out[row, 5] / wave()[row, 5]) for row in range(3)]
    assert len(set(np.round(factors, 4))) == 3
    for row, factor in enumerate(factors):
        assert abs(20 * np.log10(factor)) <= 6.0
        np.testing.assert_allclose(out[row], wave()[row] * factor, rtol=1e-5)


def test_padding_stays_silent_and_a_longer_row_starts_the_same():
    config = WaveAugmentConfig(gain_db=6.0, noise_share=1.0)
    out = np.asarray(augment_waveform(wave(), SAMPLES, KEYS, config))
    assert np.isfinite(out).all()
    assert (out * (np.arange(16000) >= SAMPLES[:, None]) == 0).all()
    longer = np.pad(wave()[1:2], ((0, 0), (0, 777)))
    longer = np.asarray(augment_waveform(longer, SAMPLES[1:2], KEYS[1:2], config))
    np.testing.assert_allclose(longer[0, :16000], out[1], atol=1e-6)


def test_scale_of_zero_and_default_settings_change_nothing():
    config = WaveAugmentConfig(gain_db=6.0, noise_share=1.0)
    np.testing.assert_array_equal(augment_waveform(wave(), SAMPLES, KEYS, config, 0.0), wave())
    out = augment_waveform(wave(), SAMPLES, KEYS, WaveAugmentConfig())
    np.testing.assert_array_equal(out, wave())


@pytest.mark.parametrize(("ratio", "slope"), [(0.0, 0.0), (1.0, -3.0)])
def test_coloured_noise_falls_by_its_decibels_an_octave(ratio, slope):
    keys = augment.row_keys(jax.random.key(0), np.arange(16))
    noise = jax.vmap(lambda key: augment.coloured_noise(key, 40_000, ratio))(keys)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    power = np.mean(np.abs(np.fft.rfft(np.asarray(noise), axis=1)) ** 2, axis=0)
    octaves = [power[20_000 >> k : 20_000 >> k - 1].mean() for k in range(1, 6)]
    steps = -np.diff(10 * np.log10(octaves))
    assert np.mean(steps) == pytest.approx(slope, abs=1.0)


def test_one_key_is_split_by_row_and_old_style_keys_work():
    config = WaveAugmentConfig(gain_db=6.0)
    key = jax.random.key(3)
    one = augment_waveform(wave(), SAMPLES, key, config)
    rows = augment_waveform(wave(), SAMPLES, augment.row_keys(key, np.arange(4)), config)
    np.testing.assert_array_equal(one, rows)
    raw = jnp.asarray(jax.random.key_data(augment.row_keys(key, np.arange(4))))
    np.testing.assert_array_equal(augment_waveform(wave(), SAMPLES, raw, config), rows)
    raw = jax.random.key_data(key)
    np.testing.assert_array_equal(augment_waveform(wave(), SAMPLES, raw, config), rows)
