"""Log-mel front ends in jit: NeMo's, before and since 2.5, and torchaudio's as LaCT ASR uses it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jasr import settings

_SEGMENT = 1024  # frames: a segment's spectra are 2 MB


@settings.section
class FrontEndConfig:
    """Settings of `log_mel`; the defaults are NeMo's Parakeet and FastConformer front end.

    kind "nemo": zeros beyond both ends, mel_len = S // hop (NeMo ≥ 2.5). "nemo_legacy": reflected
    ends and one frame more (NeMo < 2.5). "htk": torchaudio's MelSpectrogram as LaCT ASR uses it
    (periodic window, reflected ends, spectrum divided by the window's norm, HTK mel scale without
    area norm). The other fields mean the same for each kind; `NEMO` and `HTK` are complete sets.
    """

    kind: str = settings.field("nemo", choices=("nemo", "nemo_legacy", "htk"))
    sample_rate: int = settings.field(16000, least=1)  # Hz
    n_mels: int = settings.field(80, least=1)
    n_fft: int = settings.field(512, least=0)  # 0 = next power of two that holds the window
    win: int = settings.field(400, least=1)  # samples
    hop: int = settings.field(160, least=1)  # samples
    window: str = settings.field(
        "hann", choices=("hann", "hamming", "blackman", "bartlett", "ones")
    )
    low_hz: float = 0.0
    high_hz: float = 0.0  # 0 = half the sampling rate
    mel_norm: str = settings.field("slaney", choices=("slaney", "none"))  # slaney: equal area
    preemph: float = 0.97  # 0 = none
    mag_power: float = 2.0
    log: bool = True
    log_guard: float = 2.0**-24
    log_guard_type: str = settings.field("add", choices=("add", "clamp"))
    normalize: str = settings.field("per_feature", choices=("per_feature", "all_features", "none"))
    # standard deviation of noise; needs keys, so training only
    dither: float = settings.field(0.0, meaning=False)
    pad_to: int = 0  # frames are padded to a multiple; 0 = no padding
    pad_value: float = 0.0
    exact_pad: bool = False  # (n_fft - hop) / 2 on each side in place of n_fft / 2
    frame_splicing: int = 1  # copies of every feature, as NeMo's (its shift does nothing)

    def __post_init__(self):
        if self.n_fft and (self.n_fft % 2 or self.n_fft < self.win):
            raise ValueError(f"n_fft={self.n_fft}: must be even and at least win={self.win}")


NEMO = FrontEndConfig()
HTK = FrontEndConfig(kind="htk", mel_norm="none", preemph=0.0, log_guard=1e-8, normalize="none")


def log_mel(audio, audio_len, cfg: FrontEndConfig = NEMO, keys=None):
    """(log-mel features f32[B, T, F], their lengths i32[B]) of audio f32[B, S]; to be jitted.

    NeMo's AudioToMelSpectrogramPreprocessor (parts/preprocessing/features.py) or torchaudio's, see
    FrontEndConfig. T = 1 + S // hop, one frame more than NeMo's longest length, and pad_value after
    mel_len. A row depends neither on its padding nor on the other rows; samples after audio_len
    are ignored. Always f32 with full-precision products. `keys` [B] turns `dither` on.
    """
    n_fft, edge = _sizes(cfg)
    audio = jnp.asarray(audio, jnp.float32)
    audio_len = jnp.asarray(audio_len, jnp.int32)
    if keys is not None and cfg.dither:
        noise = jax.vmap(lambda key: jax.random.normal(key, audio.shape[1:]))(keys)
        audio = audio + cfg.dither * noise
    if cfg.preemph:
        audio = jnp.concatenate([audio[:, :1], audio[:, 1:] - cfg.preemph * audio[:, :-1]], axis=1)
    end = audio_len - edge if cfg.exact_pad and cfg.kind == "nemo" else audio_len  # NeMo pads first
    audio = jnp.where(jnp.arange(audio.shape[1]) < end[:, None], audio, 0.0)
    mel_len = mel_lengths(audio_len, cfg)

    blocks = _blocks(audio, audio_len, cfg, n_fft, edge)
    mel = jax.lax.platform_dependent(
        blocks,
        cpu=lambda blocks: _mel_by_fft(blocks, cfg, n_fft),
        default=lambda blocks: _mel_by_product(blocks, cfg, n_fft),
    )
    if cfg.log:
        guard = jnp.float32(cfg.log_guard)
        mel = jnp.log(mel + guard if cfg.log_guard_type == "add" else jnp.maximum(mel, guard))
    mel = jnp.tile(mel, (1, 1, cfg.frame_splicing)) if cfg.frame_splicing > 1 else mel
    mel = _normalize(mel, mel_len, cfg)
    valid = jnp.arange(mel.shape[1]) < mel_len[:, None]
    mel = jnp.where(valid[..., None], mel, cfg.pad_value)
    if cfg.pad_to:
        padding = -mel.shape[1] % cfg.pad_to
        mel = jnp.pad(mel, ((0, 0), (0, padding), (0, 0)), constant_values=cfg.pad_value)
    return mel, mel_len


def mel_lengths(audio_len, cfg: FrontEndConfig):
    """Frames i32[B] that `log_mel` makes of so many samples i32[B]."""
    n_fft, edge = _sizes(cfg)
    mel_len = (audio_len + 2 * edge - n_fft) // cfg.hop + (cfg.kind != "nemo")
    return jnp.where(audio_len > 0, jnp.maximum(mel_len, 0), 0)


def _sizes(cfg: FrontEndConfig):
    """(samples of a Fourier transform, samples that are added before the first frame's centre)."""
    n_fft = cfg.n_fft or 1 << (cfg.win - 1).bit_length()
    return n_fft, (n_fft - cfg.hop) // 2 if cfg.exact_pad else n_fft // 2


def _blocks(audio, audio_len, cfg: FrontEndConfig, n_fft: int, edge: int):
    """Samples f32[B, T + k - 1, hop] of which frame t is the first `win` from block t on.

    Frame t is the middle of the n_fft samples that start at t * hop - edge.
    """
    frames = max(0, audio.shape[1] + 2 * edge - n_fft) // cfg.hop + 1
    before = edge - (n_fft - cfg.win) // 2
    if cfg.kind != "nemo":
        audio = _reflect_ends(audio, audio_len, edge)[:, edge - before :]
        before = 0
    total = (frames - 1 + -(-cfg.win // cfg.hop)) * cfg.hop
    audio = jnp.pad(audio, ((0, 0), (before, 0)))[:, :total]
    audio = jnp.pad(audio, ((0, 0), (0, total - audio.shape[1])))
    return audio.reshape(audio.shape[0], -1, cfg.hop)


def _frames(blocks, hop: int, size: int):
    """Frames f32[..., T, size]: shifted blocks side by side, which is cheaper than a gather."""
    copies = -(-size // hop)
    frames = blocks.shape[-2] - copies + 1
    parts = [blocks[..., i : i + frames, :] for i in range(copies)]
    parts[-1] = parts[-1][..., : size - (copies - 1) * hop]
    return jnp.concatenate(parts, axis=-1)


def _mel_by_fft(blocks, cfg: FrontEndConfig, n_fft: int):
    """Mel energies f32[B, T, F], segment after segment so that the spectra stay in the cache.

    On two cores 2.5 to 4 times as fast as one FFT of everything.
    """
    batch, frames = blocks.shape[0], blocks.shape[1] + 1 - -(-cfg.win // cfg.hop)
    segments = -(-frames // _SEGMENT)
    size = -(-frames // segments)
    # Frames of n_fft samples under a window that ends in zeros: cheaper than padding each frame.
    halo = -(-n_fft // cfg.hop) - 1
    blocks = jnp.pad(blocks, ((0, 0), (0, segments * size + halo - blocks.shape[1]), (0, 0)))
    window = np.pad(stft_window(cfg), (0, n_fft - cfg.win))
    bank = filter_bank(cfg, n_fft)

    def segment(i):
        start = (i // segments, i % segments * size, 0)
        part = jax.lax.dynamic_slice(blocks, start, (1, size + halo, cfg.hop))[0]
        spectrum = jnp.fft.rfft(_frames(part, cfg.hop, n_fft) * window)
        return _mel(jnp.square(spectrum.real) + jnp.square(spectrum.imag), cfg, bank)

    mel = jax.lax.map(segment, jnp.arange(batch * segments))
    return mel.reshape(batch, segments * size, -1)[:, :frames]


def _mel_by_product(blocks, cfg: FrontEndConfig, n_fft: int):
    """Mel energies f32[B, T, F] by the DFT as a matrix: what accelerators do best.

    It also stays on its device, where XLA gathers the operand of an FFT from all of them.
    """
    angle = 2 * np.pi / n_fft * np.outer(np.arange(cfg.win), np.arange(n_fft // 2 + 1))
    window = stft_window(cfg)[:, None]
    frames, highest = _frames(blocks, cfg.hop, cfg.win), jax.lax.Precision.HIGHEST
    real = jnp.dot(frames, (window * np.cos(angle)).astype(np.float32), precision=highest)
    imaginary = jnp.dot(frames, (window * np.sin(angle)).astype(np.float32), precision=highest)
    return _mel(jnp.square(real) + jnp.square(imaginary), cfg, filter_bank(cfg, n_fft))


def _mel(power, cfg: FrontEndConfig, bank):
    if cfg.mag_power != 2.0:
        power = power ** (cfg.mag_power / 2)
    return jnp.dot(power, bank.T, precision=jax.lax.Precision.HIGHEST)


def _reflect_ends(audio, audio_len, edge: int):
    """audio f32[B, edge + S + edge], each row mirrored at its own first and last sample."""

    def row(x, n):
        x = jnp.concatenate([x[edge:0:-1], x, jnp.zeros(edge, x.dtype)])
        tail = jax.lax.dynamic_slice(x, (jnp.maximum(n - 1, 0),), (edge,))[::-1]
        return jax.lax.dynamic_update_slice(x, tail, (n + edge,))

    short = max(0, edge + 1 - audio.shape[1])
    padded = jnp.pad(audio, ((0, 0), (0, short)))
    return jax.vmap(row)(padded, audio_len)


def _normalize(mel, mel_len, cfg: FrontEndConfig):
    """Zero mean, unit deviation (N - 1, plus 1e-5) over valid frames; first frame taken off first.

    That makes a constant bin exactly 0 where rounding of the mean over 1e-5 would be noise.
    """
    if cfg.normalize == "none":
        return mel
    axes = (1,) if cfg.normalize == "per_feature" else (1, 2)
    valid = (jnp.arange(mel.shape[1]) < mel_len[:, None])[..., None]
    count = mel_len[:, None, None] * (1 if len(axes) == 1 else mel.shape[2])
    mel = mel - (mel[:, :1] if len(axes) == 1 else mel[:, :1, :1])
    mean = jnp.sum(jnp.where(valid, mel, 0), axes, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(valid, jnp.square(mel - mean), 0), axes, keepdims=True)
    deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    return (mel - mean) / (deviation + 1e-5)


@functools.lru_cache(maxsize=16)
def stft_window(cfg: FrontEndConfig) -> np.ndarray:
    """f32[win]; "htk": periodic, and divided by its norm as torchaudio's normalized=True."""
    window = getattr(np, {"hann": "hanning"}.get(cfg.window, cfg.window))
    if cfg.kind != "htk":
        return window(cfg.win).astype(np.float32)
    window = window(cfg.win + 1)[:-1]
    return (window / np.sqrt(np.sum(window**2))).astype(np.float32)


@functools.lru_cache(maxsize=16)
def filter_bank(cfg: FrontEndConfig, n_fft: int) -> np.ndarray:
    """Triangular filters f32[F, n_fft / 2 + 1], straight in Hz: on Slaney's mel scale or HTK's."""
    to_mel, to_hz = (_htk_mel, _htk_hz) if cfg.kind == "htk" else (_slaney_mel, _slaney_hz)
    high = cfg.high_hz or cfg.sample_rate / 2
    edges = to_hz(np.linspace(to_mel(cfg.low_hz), to_mel(high), cfg.n_mels + 2))
    bins = np.arange(n_fft // 2 + 1) * cfg.sample_rate / n_fft
    rise = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    bank = np.maximum(0, np.minimum(rise, fall))
    if cfg.mel_norm == "slaney":
        bank *= 2 / (edges[2:] - edges[:-2])[:, None]
    return bank.astype(np.float32)


def _htk_mel(hz):
    return 2595 * np.log10(1 + np.asarray(hz) / 700)


def _htk_hz(mel):
    return 700 * (10 ** (mel / 2595) - 1)


def _slaney_mel(hz):
    """Linear to 1 kHz (200/3 Hz a mel), then 27 mels a factor of 6.4."""
    hz = np.asarray(hz, np.float64)
    octaves = np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * octaves)


def _slaney_hz(mel):
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
