"""NeMo's `preprocessor` and `encoder` sections as settings of our front end and encoder, and back.

Every model of NeMo's that hears has these two, whatever stands behind its encoder.
"""

import dataclasses
import re

import numpy as np

from jasr.audio.features import FrontEndConfig
from jasr.interop import sections
from jasr.interop.sections import UNSAID, Row, Table
from jasr.models.fastconformer.settings import FastConformerConfig

MODULES = "nemo.collections.asr.modules"
LONGEST_WINDOW = 10.0  # s
_GUARDS = {"tiny": float(np.finfo(np.float32).tiny), "eps": float(np.finfo(np.float32).eps)}


def is_legacy(nemo_version):
    """Whether the version, "2.4.0" or "2.5.0rc1", is before 2.5; files without one are older."""
    match = re.match(r"(\d+)\.(\d+)", str(nemo_version or ""))
    return match is None or (int(match[1]), int(match[2])) < (2, 5)


# ---- the front end -------------------------------------------------------------------------------


def _samples(both, values):
    """A window in samples, or of one in seconds, which NeMo cuts."""
    seconds, samples = both
    if samples:
        return samples
    if isinstance(seconds, bool | str) or not 0 <= seconds <= LONGEST_WINDOW:
        raise ValueError(f"not a number of seconds from 0 to {LONGEST_WINDOW}")
    return int(seconds * values["sample_rate"])


def _seconds(samples, values):
    """(seconds, None) where they say it exactly, else (None, samples)."""
    seconds = samples / values["sample_rate"]
    return (seconds, None) if int(seconds * values["sample_rate"]) == samples else (None, samples)


def _normalize(kind, _):
    if isinstance(kind, dict):
        raise ValueError("and fixed values are not done here")
    return kind if kind in ("per_feature", "all_features") else "none"


def _window(ours, name, seconds):
    keys = (f"window_{name}", f"n_window_{name}")
    return Row(keys, ours, (seconds, None), _samples, _seconds)


FRONT_END = Table(
    "preprocessor",
    FrontEndConfig,
    (
        Row("sample_rate", usual=16000),
        Row("features", "n_mels", 64),
        Row("n_fft", usual=0, write={0: None}),
        Row("lowfreq", "low_hz", 0.0),
        Row("highfreq", "high_hz", 0.0, write=lambda hz, _: hz or None),
        Row("preemph", usual=0.97, read={None: 0.0}),
        Row("mag_power", usual=2.0),
        Row("log", usual=True),
        Row("log_zero_guard_type", "log_guard_type", "add"),
        Row("dither", usual=1e-5),
        Row("pad_to", usual=16),
        Row("pad_value", usual=0.0),
        Row("exact_pad", usual=False),
        Row("frame_splicing", usual=1),
        _window("win", "size", 0.02),
        _window("hop", "stride", 0.01),
        Row("window", usual="hann", read={None: "ones", "": "ones"}),
        Row("mel_norm", usual="slaney", read={None: "none", "": "none"}, write={"none": None}),
        Row("log_zero_guard_value", "log_guard", 2**-24, _GUARDS),
        Row("normalize", usual="per_feature", read=_normalize, write={"none": "NA"}),
    ),
    target=f"{MODULES}.AudioToMelSpectrogramPreprocessor",
    # other arithmetic if true
    only_as=dict.fromkeys(
        "use_grads use_torchaudio stft_conv stft_exact_pad".split(), (False, None)
    ),
    silent=("nb_augmentation_prob", "nb_max_freq", "rng"),  # of training
    none_is_usual=True,
)


def read_front_end(section, legacy, problems):
    """FrontEndConfig's fields as a dict, from the `preprocessor` section; None with `problems`.

    legacy: the model is of a NeMo before 2.5 (`is_legacy`): kind "nemo_legacy".
    """
    values = sections.read(FRONT_END, section, problems)
    kind = "nemo_legacy" if legacy else "nemo"
    ours = None if values is None else {**values, "kind": kind}
    return sections.complete(FrontEndConfig, ours, "preprocessor", problems)


def write_front_end(front_end):
    """The `preprocessor` section of FrontEndConfig's fields. ValueError: kind "htk"."""
    if front_end["kind"] == "htk":
        raise ValueError("NeMo has no front end of kind 'htk'")
    return sections.write(FRONT_END, front_end)


# ---- the encoder ---------------------------------------------------------------------------------

_NAMES = [f.name for f in dataclasses.fields(FastConformerConfig)]
OURS = _NAMES[_NAMES.index("masked_subsampling") :]  # not in NeMo's config
# Rows that say more than a name.
_ROWS = (
    Row("subsampling", read={None: UNSAID, "": UNSAID, False: UNSAID}),
    Row(
        ("subsampling_factor", "subsampling"),
        "subsampling_factor",
        (UNSAID, True),
        lambda both, _: both[0] if both[1] else 1,  # NeMo: a linear map if subsampling is null
        lambda factor, values: (factor, values["subsampling"]),
    ),
    Row("att_context_size", read=lambda size, _: size or UNSAID),
    Row("att_context_probs", read=lambda probs, _: probs or UNSAID, write={(): None}),
)
_ROWS = {row.field: row for row in _ROWS}
ENCODER = Table(
    "encoder",
    FastConformerConfig,
    tuple(_ROWS.get(name, Row(name)) for name in _NAMES if name not in OURS),
    target=f"{MODULES}.ConformerEncoder",
    only_as={  # of younger versions
        "att_chunk_context_size": (None,),
        "conv_context_style": (None, "regular"),
        "rope_base": (None, 10000.0),
        "rotary_fraction": (None, 1.0),
    },
    # They choose a kernel, serve several machines or save memory, and change no number.
    silent=(
        "pos_emb_max_len",
        "subsampling_conv_chunking_factor",
        "sync_max_audio_length",
        "use_pytorch_sdpa",
        "use_pytorch_sdpa_backends",
    ),
)


def read_encoder(section, legacy, problems):
    """FastConformerConfig's fields as a dict, from the `encoder` section; None with `problems`.

    legacy: the model is of a NeMo before 2.5, whose subsampling does not mask its padding.
    """
    values = sections.read(ENCODER, section, problems)
    ours = None if values is None else {**values, "masked_subsampling": not legacy}
    return sections.complete(FastConformerConfig, ours, "encoder", problems)


def write_encoder(encoder):
    """The `encoder` section that NeMo builds FastConformerConfig's fields from."""
    return sections.write(ENCODER, encoder)
