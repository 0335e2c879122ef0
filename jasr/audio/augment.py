"""Training noise for speech: SpecAugment and mel warp, gain and noise in jit; speed on the host.

Every function in jit takes one key per row, so that an utterance is augmented the same way
whatever its batch mates. `row_keys` makes them from the rows' index numbers.
"""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from jasr import settings
from jasr.audio.resample import resample


@settings.section
class SpecAugmentConfig:
    """Settings of `spec_augment`; the defaults are NeMo's FastConformer recipe without warp.

    Raises:
      ValueError: a setting that the style does not have.
    """

    # nemo: cell for cell its vectorised code, see `masks`
    style: str = settings.field("jasr", choices=("jasr", "nemo"))
    freq_masks: int = settings.field(2, least=0)
    freq_width: int = settings.field(27, least=0)  # bins, exclusive
    time_masks: int = settings.field(10, least=0)
    # up to 1: share of the utterance's frames; above: frames, exclusive
    time_width: float = settings.field(0.05, least=0)
    # mean: of each bin over the utterance
    fill: str = settings.field("zero", choices=("zero", "mean"))
    warp: float = 0.0  # largest relative stretch of the frequency axis
    mask_value: float = 0.0  # what NeMo's style fills with

    def __post_init__(self):
        if self.style == "nemo" and (self.fill != "zero" or self.warp):
            raise ValueError("spec_augment.style='nemo' has mask_value, but no fill and no warp")
        if self.style == "jasr" and self.mask_value:
            raise ValueError("spec_augment.mask_value is of style='nemo'; style='jasr' has fill")


@settings.section
class WaveAugmentConfig:
    """Settings of `augment_waveform`; the defaults change nothing."""

    gain_db: float = 0.0  # uniform in ± gain_db
    # probability that an utterance gets noise
    noise_share: float = settings.field(0.0, least=0, most=1)
    snr_low_db: float = 10.0  # signal-to-noise ratio, uniform
    snr_high_db: float = 40.0
    noise_colour: float = 1.0  # most amplitude an octave down: 0 white, 1 pink, 1.4 brown


def row_keys(key, index):
    """Keys [B] from one key and the rows' numbers `index` i[B]: the same row has the same key."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(index).astype(jnp.uint32))


def spec_augment(mel, mel_len, keys, cfg: SpecAugmentConfig, scale=1.0):
    """Log-mel f32[B, T, F] with its frequency axis stretched and bands of bins and frames masked.

    Masks as `masks` draws them. `scale` in [0, 1] shrinks widths and warp, to ramp them in. keys
    [B], see `row_keys`; one key is split by row position. In jasr's style frames after mel_len are
    left alone.
    """
    valid = (jnp.arange(mel.shape[1]) < mel_len[:, None])[..., None]
    count = 1 + 2 * (cfg.time_masks + cfg.freq_masks)
    keys = _each_row(keys, len(mel))
    draws = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
    ends = np.cumsum([1, *[cfg.time_masks] * 2, cfg.freq_masks])
    warp, *draws = jnp.split(draws, ends, axis=1)
    masked = masks(mel.shape, mel_len, draws, cfg, scale)
    if cfg.style == "nemo":
        return jnp.where(masked, jnp.asarray(cfg.mask_value, mel.dtype), mel)
    original = mel
    if cfg.warp:
        mel = warp_mel(mel, 1 + scale * cfg.warp * (2 * warp[:, 0] - 1))
    fill = jnp.zeros((), mel.dtype)
    if cfg.fill == "mean":
        total = jnp.sum(jnp.where(valid, mel, 0), axis=1, keepdims=True)
        fill = total / jnp.maximum(mel_len.astype(jnp.float32), 1)[:, None, None]
    return jnp.where(valid, jnp.where(masked, fill, mel), original)


def masks(shape, mel_len, draws, cfg: SpecAugmentConfig, scale=1.0):
    """bool[B, T, F], True where a batch is masked, as by NeMo's SpectrogramAugmentation
    (vectorised): width = floor(u * largest width), start = trunc(u' * (extent - width)).

    In NeMo's style masks of bins reach over the padding, and masks wider than the utterance may
    reach over its end; jasr's are narrowed to it.

    Args:
      shape: (B, T, F); T is the padded length.
      draws: uniforms in the order in which NeMo draws them: time widths and starts
        [B, time_masks], frequency widths and starts [B, freq_masks].
    """
    _, time, bins = shape
    extent = mel_len.astype(jnp.float32)[:, None]
    over_time = cfg.time_width * extent if cfg.time_width <= 1 else float(cfg.time_width)
    over_bins = float(cfg.freq_width)
    if cfg.style == "jasr":
        over_time, over_bins = jnp.minimum(over_time, extent), min(over_bins, float(bins))
    frames = bands(*draws[:2], scale * over_time, extent, time)
    return frames[:, :, None] | bands(*draws[2:], scale * over_bins, float(bins), bins)[:, None, :]


def bands(width_draw, start_draw, widest, extent, size: int):
    """bool[B, size], True in the union of the masks drawn by two uniforms [B, masks]."""
    width = jnp.floor(width_draw * widest)
    start = jnp.trunc(start_draw * (extent - width))  # may be negative in NeMo's style
    position = jnp.arange(size, dtype=jnp.float32)[None, None, :]
    inside = (position >= start[..., None]) & (position < (start + width)[..., None])
    return inside.any(axis=1)


def warp_mel(mel, factor):
    """Log-mel [B, T, F] with bin f read at f * factor[B], by linear interpolation; ends repeated.

    Vocal tract length perturbation (Jaitly & Hinton 2013) on the mel axis, as one [F, F] product.
    """
    bins = mel.shape[-1]
    source = jnp.clip(jnp.arange(bins) * factor[:, None], 0, bins - 1)
    weights = jnp.maximum(0, 1 - jnp.abs(jnp.arange(bins)[None, :, None] - source[:, None, :]))
    return jnp.einsum("btf,bfg->btg", mel, weights, precision=jax.lax.Precision.HIGHEST)


def augment_waveform(audio, audio_len, keys, cfg: WaveAugmentConfig, scale=1.0):
    """Audio f32[B, S] with a random gain and, for a share of rows, stationary coloured noise.

    The noise's power is that of the utterance over a ratio drawn from [snr_low_db, snr_high_db].
    Samples after audio_len stay 0. `scale` in [0, 1] ramps gain and share in. keys [B], see
    `row_keys`; one key is split by row position.
    """
    rows, samples = audio.shape
    valid = jnp.arange(samples) < audio_len[:, None]

    def row(x, n, key):
        draw_key, noise_key = jax.random.split(key)
        gain, share, snr, colour = jax.random.uniform(draw_key, (4,))
        if cfg.noise_share:
            snr = cfg.snr_low_db + snr * (cfg.snr_high_db - cfg.snr_low_db)
            power = jnp.sum(jnp.square(x)) / jnp.maximum(n, 1)
            level = jnp.sqrt(power) * 10 ** (-snr / 20) * (share < cfg.noise_share * scale)
            x = x + level * coloured_noise(noise_key, samples, colour * cfg.noise_colour)
        return x * 10 ** (scale * cfg.gain_db * (2 * gain - 1) / 20)

    audio = jnp.where(valid, audio, 0)
    return jnp.where(valid, jax.vmap(row)(audio, audio_len, _each_row(keys, rows)), 0)


def coloured_noise(key, samples: int, ratio):
    """Noise f32[S] of variance 1, white for ratio 0, pink for 1, brown for 1.4 (√2).

    Voss's sum: white noise, plus `ratio` times white noise held for 2 samples, and so on to 64.
    Sample t depends on key and t alone, so a longer row begins with the same noise.
    """
    octaves = 6
    white = _white(key, -(-samples // 2**octaves) * 2**octaves)
    total = white[: len(white) >> octaves]
    for k in range(octaves - 1, -1, -1):
        total = white[: len(white) >> k] + ratio * jnp.repeat(total, 2)
    power = jnp.sum(jnp.square(ratio) ** jnp.arange(octaves + 1))
    return total[:samples] / jnp.sqrt(power)


def _white(key, samples: int):
    """Uniform noise of variance 1: an integer hash of the sample's number, seeded by the key.

    Threefry, 50 times slower on a CPU, would cost a tenth of a small model's training step.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    x = jnp.arange(samples, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9) + first
    x = (x ^ x >> 16) * jnp.uint32(0x7FEB352D)
    x = (x ^ x >> 15 ^ second) * jnp.uint32(0x846CA68B)
    x = x ^ x >> 16
    return ((x >> 8).astype(jnp.float32) * 2.0**-24 - 0.5) * 12**0.5


def _each_row(keys, rows: int):
    """Keys [B], of one key where it is one."""
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    return row_keys(keys, jnp.arange(rows)) if keys.ndim == (0 if typed else 1) else keys


def speed(x, factor: float) -> np.ndarray:
    """Samples f32[~S / factor] of x f32[S] played `factor` times as fast; pitch moves with it."""
    ratio = Fraction(factor).limit_denominator(100)
    if ratio <= 0:
        raise ValueError(f"factor={factor}: must be positive")
    if ratio == 1:
        return np.asarray(x, np.float32)
    return resample(x, ratio.numerator, ratio.denominator)
