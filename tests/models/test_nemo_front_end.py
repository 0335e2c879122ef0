"""NeMo's preprocessor section as our front end's settings."""

import json

import numpy as np
import pytest

from jasr.models.fastconformer import nemo_front_end
from jasr.models.fastconformer.nemo_front_end import FrontEndError
from jasr.systems.fastconformer import nemo_problems


def test_missing_keys_are_nemos_defaults():
    got = nemo_front_end.read({})
    assert (got["win"], got["hop"], got["n_mels"], got["pad_to"]) == (320, 160, 64, 16)
    assert got["dither"] == 1e-5 and got["n_fft"] == 0 and got["kind"] == "nemo"
    assert nemo_front_end.read({}, legacy=True)["kind"] == "nemo_legacy"


def test_every_setting_is_read_and_written_back():
    section = {
        "sample_rate": 8000, "n_window_size": 201, "n_window_stride": 80, "window": None,
        "features": 40, "n_fft": None, "lowfreq": 20, "highfreq": 3800, "log": False,
        "log_zero_guard_type": "clamp", "log_zero_guard_value": "eps", "dither": 0.0, "pad_to": 0,
        "frame_splicing": 2, "exact_pad": True, "pad_value": -1, "mag_power": 1, "mel_norm": None,
        "preemph": None, "normalize": "all_features", "nb_augmentation_prob": 0.1, "rng": None,
        "use_grads": False,
    }  # fmt: skip
    got = nemo_front_end.read(section)
    assert (got["win"], got["window"], got["mel_norm"], got["preemph"]) == (201, "ones", "none", 0)
    assert got["log_guard"] == float(np.finfo(np.float32).eps) and got["pad_value"] == -1
    assert got["high_hz"] == 3800 and got["frame_splicing"] == 2 and got["exact_pad"] is True
    assert nemo_front_end.read(nemo_front_end.write(got)) == got
    assert nemo_front_end.read({"normalize": "NA"})["normalize"] == "none"
    assert nemo_front_end.read({"window_size": 0.025})["win"] == 400
    for samples in (1, 399, 400, 401, 1023):  # seconds where they say it exactly
        front_end = {**got, "win": samples, "sample_rate": 16000}
        written = nemo_front_end.write(front_end)
        assert (written["window_size"] is None) is not (written["n_window_size"] is None)
        assert nemo_front_end.read(written) == front_end


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"foo": 1}, "unknown settings: foo: 1"),
        ({"use_torchaudio": True}, "use_torchaudio: True"),
        ({"_target_": "nemo.AudioToMFCCPreprocessor"}, "not AudioToMelSpectrogramPreprocessor"),
        ({"normalize": {"fixed_mean": [0]}}, "fixed values"),
        ({"window": "kaiser"}, "window must be one of"),
        ({"pad_to": "max"}, "preprocessor.pad_to must be int"),
        ({"n_fft": 200}, "n_fft=200"),
        ({"window_stride": 1e-9}, "preprocessor.hop must be at least 1"),
        ({"window_size": "0.025", "sample_rate": 1 << 40}, "sample_rate is 1099511627776, not a"),
        ({"window_size": "0.025"}, "window_size is '0.025', not a number from 0 to 10"),
        ({"window_size": [0.025]}, r"window_size is \[0.025\], not a number"),
        ({"window_stride": None}, "window_stride is None"),
        ({"window_stride": 11}, "window_stride is 11"),
        ({"window_size": float("nan")}, "window_size is nan"),
        ({"sample_rate": "16000"}, "sample_rate is '16000'"),
        ({"sample_rate": 0}, "sample_rate is 0"),
    ],
)
def test_what_it_does_not_have_is_refused(section, reason):
    with pytest.raises(ValueError, match=reason):
        nemo_front_end.read(section)
    with pytest.raises(FrontEndError, match="htk"):
        nemo_front_end.write({"kind": "htk"})


def test_versions_are_compared_as_numbers():
    for version in ("2.4.0", "1.23.0", "0.11", "", None, "r2.0.0", "2"):
        assert nemo_front_end.is_legacy(version)
    for version in ("2.5.0", "2.5.0rc1", "2.5rc1", "2.10.0", "3.0.0"):
        assert not nemo_front_end.is_legacy(version)


def test_the_settings_give_nemos_windows_and_filters(shared_dir):
    folder = shared_dir / "goldens" / "nemo"
    cases = json.loads((folder / "preproc_cases.json").read_text())
    with np.load(folder / "preproc.npz") as z:
        compared = [name for name in cases if f"{name}/fb" in z]
        assert len(compared) >= 3
        for name in compared:
            buffers = nemo_problems.featurizer(nemo_front_end.read(cases[name]))
            for key, (shape, compute) in buffers.items():
                want = z[f"{name}/{key.rpartition('.')[2]}"]
                assert shape == want.shape
                np.testing.assert_allclose(compute(), want, atol=1e-6)
