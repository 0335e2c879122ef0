"""NeMo's front end: the `preprocessor` section of a config as FrontEndConfig's fields, and back."""

import re

import numpy as np

from jasr import settings
from jasr.audio.features import FrontEndConfig

TARGET = "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor"
# AudioToMelSpectrogramPreprocessor's keys that are only renamed, with NeMo's defaults.
_RENAMED = {
    "sample_rate": ("sample_rate", 16000),
    "n_mels": ("features", 64),
    "n_fft": ("n_fft", 0),
    "low_hz": ("lowfreq", 0.0),
    "high_hz": ("highfreq", 0.0),
    "preemph": ("preemph", 0.97),
    "mag_power": ("mag_power", 2.0),
    "log": ("log", True),
    "log_guard_type": ("log_zero_guard_type", "add"),
    "dither": ("dither", 1e-5),
    "pad_to": ("pad_to", 16),
    "pad_value": ("pad_value", 0.0),
    "exact_pad": ("exact_pad", False),
    "frame_splicing": ("frame_splicing", 1),
}
_OTHERS = (
    "_target_ window_size window_stride n_window_size n_window_stride window normalize mel_norm "
    "log_zero_guard_value"
).split()
_TRAINING = "nb_augmentation_prob nb_max_freq rng".split()
_OFF = "use_grads use_torchaudio stft_conv stft_exact_pad".split()  # other arithmetic if true
HIGHEST_RATE, LONGEST_WINDOW = 1_000_000, 10.0  # Hz, s
_GUARDS = {"tiny": float(np.finfo(np.float32).tiny), "eps": float(np.finfo(np.float32).eps)}


class FrontEndError(ValueError):
    """A front end that is not NeMo's as known here."""


def is_legacy(nemo_version):
    """Whether the version, "2.4.0" or "2.5.0rc1", is before 2.5; files without one are older."""
    match = re.match(r"(\d+)\.(\d+)", str(nemo_version or ""))
    return match is None or (int(match[1]), int(match[2])) < (2, 5)


def read(preprocessor, legacy=False):
    """FrontEndConfig's fields as a dict, from the `preprocessor` section.

    Windows in seconds become samples as NeMo does it, by cutting. legacy: the model is of a NeMo
    before 2.5 (`is_legacy`), kind "nemo_legacy".

    Raises:
      FrontEndError, ValueError: another preprocessor, or a key or value that it does not have.
    """
    target = str(preprocessor.get("_target_", "AudioToMelSpectrogramPreprocessor"))
    if target.rpartition(".")[2] != "AudioToMelSpectrogramPreprocessor":
        raise FrontEndError(
            f"the preprocessor is a {target}, not AudioToMelSpectrogramPreprocessor"
        )
    known = {key for key, _ in _RENAMED.values()} | {*_OTHERS, *_TRAINING}
    unknown = sorted(
        f"{key}: {value!r}"
        for key, value in preprocessor.items()
        if key not in known and (value or key not in _OFF)
    )
    if unknown:
        raise FrontEndError(f"the preprocessor has unknown settings: {', '.join(unknown)}")
    values = {
        ours: preprocessor[key] if preprocessor.get(key) is not None else default
        for ours, (key, default) in _RENAMED.items()
    }
    if "preemph" in preprocessor and preprocessor["preemph"] is None:
        values["preemph"] = 0.0
    rate = _number("sample_rate", values["sample_rate"], 1, HIGHEST_RATE)
    for ours, key, seconds in (("win", "window_size", 0.02), ("hop", "window_stride", 0.01)):
        samples = preprocessor.get(f"n_{key}")
        if not samples:
            samples = int(_number(key, preprocessor.get(key, seconds), 0, LONGEST_WINDOW) * rate)
        values[ours] = samples
    guard = preprocessor.get("log_zero_guard_value", 2**-24)
    normalize = preprocessor.get("normalize", "per_feature")
    if isinstance(normalize, dict):
        raise FrontEndError("preprocessor.normalize with fixed values is not done here")
    values |= {
        "kind": "nemo_legacy" if legacy else "nemo",
        "window": preprocessor.get("window", "hann") or "ones",
        "mel_norm": preprocessor.get("mel_norm", "slaney") or "none",
        "log_guard": float(_GUARDS.get(guard, guard)),
        "normalize": normalize if normalize in ("per_feature", "all_features") else "none",
    }
    config = settings.build(FrontEndConfig, values, "preprocessor")
    return settings.to_dict(config)


def _number(key, value, low, high):
    """`value`, if it is a number from `low` to `high`: what is multiplied must not become huge."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise FrontEndError(
            f"preprocessor.{key} is {value!r:.80}, not a number from {low} to {high}"
        )
    return value


def write(front_end):
    """The `preprocessor` section of FrontEndConfig's fields; FrontEndError for kind "htk"."""
    if front_end["kind"] == "htk":
        raise FrontEndError("NeMo has no front end of kind 'htk'")
    section = {key: front_end[ours] for ours, (key, _) in _RENAMED.items()}
    rate = front_end["sample_rate"]
    for ours, key in (("win", "window_size"), ("hop", "window_stride")):
        seconds = front_end[ours] / rate
        exact = int(seconds * rate) == front_end[ours]
        section[key] = seconds if exact else None
        section[f"n_{key}"] = None if exact else front_end[ours]
    return {
        "_target_": TARGET,
        **section,
        "n_fft": front_end["n_fft"] or None,
        "highfreq": front_end["high_hz"] or None,
        "window": front_end["window"],
        "mel_norm": None if front_end["mel_norm"] == "none" else front_end["mel_norm"],
        "log_zero_guard_value": front_end["log_guard"],
        "normalize": "NA" if front_end["normalize"] == "none" else front_end["normalize"],
    }
