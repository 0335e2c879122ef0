"""Log-mel front ends against NeMo, torchaudio and transformers, whatever the padding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jasr.audio import augment, features
from jasr.audio.features import HTK, NEMO, FrontEndConfig

log_mel = jax.jit(features.log_mel, static_argnums=2)


def speech(lengths=(10400, 7345), seed=0):
    """Noise in syllables f32[B, S], zero after its lengths i32[B]."""
    rng = np.random.default_rng(seed)
    audio = np.zeros((len(lengths), max(lengths)), np.float32)
    for row, n in zip(audio, lengths, strict=True):
        row[:n] = rng.normal(size=n) * np.sin(np.arange(n) / 900) ** 2 * 0.1
    return audio, np.array(lengths, np.int32)


def nemo_config(case):
    """FrontEndConfig of NeMo's AudioToMelSpectrogramPreprocessor arguments."""
    rate = case["sample_rate"]
    guard = case.get("log_zero_guard_value", 2.0**-24)
    if isinstance(guard, str):
        guard = float(getattr(np.finfo(np.float32), guard))
    normalize = case["normalize"]
    return FrontEndConfig(
        n_mels=case["features"],
        n_fft=case["n_fft"] or 0,
        win=case.get("n_window_size") or int(case["window_size"] * rate),
        hop=case.get("n_window_stride") or int(case["window_stride"] * rate),
        window=case["window"],
        low_hz=case.get("lowfreq", 0),
        high_hz=case.get("highfreq", 0),
        mel_norm=case.get("mel_norm", "slaney") or "none",
        preemph=case.get("preemph", 0.97) or 0.0,
        mag_power=case.get("mag_power", 2.0),
        log=case.get("log", True),
        log_guard=guard,
        log_guard_type=case.get("log_zero_guard_type", "add"),
        normalize=normalize if normalize in ("per_feature", "all_features") else "none",
        pad_to=case["pad_to"],
        pad_value=case.get("pad_value", 0.0),
        exact_pad=case.get("exact_pad", False),
        frame_splicing=case.get("frame_splicing", 1),
    )


# ---- parity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("default80", NEMO),
        ("exact_pad", FrontEndConfig(exact_pad=True)),
        ("mag1", FrontEndConfig(mag_power=1.0)),
    ],
)
def test_nemo_golden(case, config, goldens):
    golden = np.load(goldens / "audio" / "front_ends.npz")
    audio = golden["pcm"] / np.float32(32768)
    mel, mel_len = log_mel(audio, golden["audio_len"], config)
    np.testing.assert_array_equal(mel_len, golden[f"nemo/{case}/len"])
    want = golden[f"nemo/{case}/mel"].transpose(0, 2, 1)
    np.testing.assert_allclose(mel, want, atol=1e-3)  # logs of energies near the guard


def test_every_nemo_golden(shared_dir):
    folder = shared_dir / "goldens" / "nemo"
    golden = np.load(folder / "preproc.npz")
    for name, case in json.loads((folder / "preproc_cases.json").read_text()).items():
        config = nemo_config(case)
        mel, mel_len = log_mel(golden["audio"], golden["audio_len"], config)
        np.testing.assert_array_equal(mel_len, golden[f"{name}/len"], err_msg=name)
        want = golden[f"{name}/mel"].transpose(0, 2, 1)
        # bins that sit at the guard are exactly 0 here; NeMo has 0.087 there, its mean's rounding
        # error over the 1e-5 that it adds to a deviation of 0
        noise = np.ptp(want[:, : golden[f"{name}/len"].min()], axis=1, keepdims=True) == 0
        if config.normalize == "per_feature":
            assert np.abs(np.where(noise, mel, 0)).max() == 0, name
            want = np.where(noise, 0, want)
        np.testing.assert_allclose(mel, want, atol=1e-3, err_msg=name)
        if f"{name}/fb" in golden:
            bank = features.filter_bank(config, config.n_fft)
            np.testing.assert_allclose(bank, golden[f"{name}/fb"][0], atol=1e-8, err_msg=name)


def test_htk_golden(goldens):
    golden = np.load(goldens / "audio" / "front_ends.npz")
    wav, want = golden["htk/wav"], golden["htk/logmel"].transpose(0, 2, 1)
    mel, mel_len = log_mel(wav[None], np.array([len(wav)]), HTK)
    assert mel_len == want.shape[1] == 1 + len(wav) // 160
    np.testing.assert_allclose(mel, want, atol=1e-4 * np.abs(want).max())


def test_lengths_are_nemos_down_to_one_sample(goldens):
    golden = np.load(goldens / "audio" / "front_ends.npz")
    lengths = golden["nemo/short/audio_len"]
    mel, mel_len = log_mel(np.zeros((len(lengths), lengths.max()), np.float32), lengths, NEMO)
    np.testing.assert_array_equal(mel_len, golden["nemo/short/mel_len"])
    assert np.all(np.asarray(mel) == 0)  # digital silence


@pytest.mark.parametrize("mels", [80, 128])
def test_transformers_parakeet_features(mels):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    audio, lengths = speech()
    extractor = transformers.ParakeetFeatureExtractor(feature_size=mels)
    rows = [x[:n] for x, n in zip(audio, lengths, strict=True)]
    theirs = extractor(rows, sampling_rate=16000, return_tensors="np")
    mel, mel_len = log_mel(audio, lengths, FrontEndConfig(n_mels=mels))
    np.testing.assert_array_equal(mel_len, theirs["attention_mask"].sum(1))
    np.testing.assert_allclose(mel, theirs["input_features"], atol=1e-4)


def test_nemo_before_2_5_reflects_the_ends():
    torch = pytest.importorskip("torch")
    audio, lengths = speech((4321,))
    x = torch.from_numpy(audio)
    x = torch.cat([x[:, :1], x[:, 1:] - 0.97 * x[:, :-1]], dim=1)
    window = torch.hann_window(400, periodic=False)
    spectrum = torch.stft(x, 512, 160, 400, window, pad_mode="reflect", return_complex=True)
    bank = torch.from_numpy(features.filter_bank(NEMO, 512))
    want = torch.log(bank @ spectrum.abs() ** 2 + 2**-24)
    want = (want - want.mean(2, keepdim=True)) / (want.std(2, keepdim=True) + 1e-5)
    mel, mel_len = log_mel(audio, lengths, FrontEndConfig(kind="nemo_legacy"))
    assert mel_len == 28 and mel.shape == (1, 28, 80)
    np.testing.assert_allclose(mel[0], want[0].numpy().T, atol=1e-3)


# ---- what the features do not depend on --------------------------------------------------------

KINDS = {"nemo": NEMO, "htk": HTK, "nemo_legacy": FrontEndConfig(kind="nemo_legacy")}


@pytest.mark.parametrize("kind", KINDS)
def test_padding_batch_mates_and_later_samples_change_nothing(kind):
    audio, lengths = speech((10400, 7345, 160, 0))
    together, mel_len = log_mel(audio, lengths, KINDS[kind])
    padded = np.pad(audio, ((0, 0), (0, 90_000)))
    padded[np.arange(padded.shape[1]) >= lengths[:, None]] = 3.0
    longer, longer_len = log_mel(padded, lengths, KINDS[kind])
    np.testing.assert_array_equal(longer_len, mel_len)
    np.testing.assert_allclose(longer[:, : together.shape[1]], together, atol=1e-5)
    assert np.all(np.asarray(longer[:, together.shape[1] :]) == 0)
    for row, n in enumerate(lengths[:2]):
        alone, alone_len = log_mel(audio[row : row + 1, :n], lengths[row : row + 1], KINDS[kind])
        assert alone_len == mel_len[row]
        np.testing.assert_allclose(alone[0], together[row, : alone.shape[1]], atol=1e-5)
    assert mel_len[3] == 0 and np.all(np.asarray(together[3]) == 0)
    assert np.all(np.isfinite(np.asarray(longer)))


@pytest.mark.parametrize("config", [NEMO, HTK, FrontEndConfig(win=320, n_mels=40, mag_power=1.0)])
def test_products_of_accelerators_equal_the_fft_of_cpus(config):
    audio, lengths = speech()
    blocks = features._blocks(jnp.asarray(audio), jnp.asarray(lengths), config, 512, 256)
    fft = features._mel_by_fft(blocks, config, 512)
    product = features._mel_by_product(blocks, config, 512)
    np.testing.assert_allclose(product, fft, atol=1e-5 * float(fft.max()))


@pytest.mark.parametrize(("platform", "fft"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_only_cpus_get_an_fft(platform, fft):
    traced = jax.jit(features.log_mel).trace(*speech())
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("fft" in text.replace("_by_fft", "").replace("n_fft", "")) == fft


def test_features_of_half_precision_audio_are_f32():
    audio, lengths = speech()
    mel, _ = log_mel(jnp.asarray(audio, jnp.bfloat16), lengths, NEMO)
    assert mel.dtype == jnp.float32
    same, _ = log_mel(np.asarray(jnp.asarray(audio, jnp.bfloat16), np.float32), lengths, NEMO)
    np.testing.assert_array_equal(mel, same)


def test_dither_needs_keys_and_stays_inside_the_utterance():
    audio, lengths = speech()
    config = FrontEndConfig(dither=1e-3, normalize="none")
    keys = augment.row_keys(jax.random.key(0), [3, 4])
    clean, mel_len = log_mel(audio, lengths, config)
    noisy, _ = log_mel(audio, lengths, config, keys)
    assert np.abs(np.asarray(noisy - clean)).max() > 0.1
    assert np.all(np.asarray(noisy[1, mel_len[1] :]) == 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "kaldi"},
        {"window": "kaiser"},
        {"normalize": "per_batch"},
        {"n_fft": 256},
        {"mel_norm": "htk"},
    ],
)
def test_unknown_settings_raise_with_their_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        features.log_mel(*speech(), FrontEndConfig(**wrong))
