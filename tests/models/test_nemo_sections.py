"""NeMo's preprocessor and encoder sections as the settings of our front end and encoder."""

import json

import numpy as np
import pytest

from jasr.models.fastconformer import nemo_sections
from jasr.models.fastconformer.nemo_sections import write_front_end
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.systems.fastconformer import nemo_weights


def reader(read):
    """(section, legacy) -> what `read` makes of it; ValueError lists its problems."""

    def made(section, legacy=False):
        problems = []
        values = read(section, legacy, problems)
        if problems:
            assert values is None
            raise ValueError("; ".join(problems))
        return values

    return made


front_end = reader(nemo_sections.read_front_end)
encoder = reader(nemo_sections.read_encoder)


def test_missing_keys_are_nemos_defaults():
    got = front_end({})
    assert (got["win"], got["hop"], got["n_mels"], got["pad_to"]) == (320, 160, 64, 16)
    assert got["dither"] == 1e-5 and got["n_fft"] == 0 and got["kind"] == "nemo"
    assert front_end({}, legacy=True)["kind"] == "nemo_legacy"


def test_every_setting_is_read_and_written_back():
    section = {
        "sample_rate": 8000, "n_window_size": 201, "n_window_stride": 80, "window": None,
        "features": 40, "n_fft": None, "lowfreq": 20, "highfreq": 3800, "log": False,
        "log_zero_guard_type": "clamp", "log_zero_guard_value": "eps", "dither": 0.0, "pad_to": 0,
        "frame_splicing": 2, "exact_pad": True, "pad_value": -1, "mag_power": 1, "mel_norm": None,
        "preemph": None, "normalize": "all_features", "nb_augmentation_prob": 0.1, "rng": None,
        "use_grads": False,
    }  # fmt: skip
    got = front_end(section)
    assert (got["win"], got["window"], got["mel_norm"], got["preemph"]) == (201, "ones", "none", 0)
    assert got["log_guard"] == float(np.finfo(np.float32).eps) and got["pad_value"] == -1
    assert got["high_hz"] == 3800 and got["frame_splicing"] == 2 and got["exact_pad"] is True
    assert front_end(write_front_end(got)) == got
    assert front_end({"normalize": "NA"})["normalize"] == "none"
    assert front_end({"window_size": 0.025})["win"] == 400
    for samples in (1, 399, 400, 401, 1023):  # seconds where they say it exactly
        ours = {**got, "win": samples, "sample_rate": 16000}
        written = write_front_end(ours)
        assert (written["window_size"] is None) is not (written["n_window_size"] is None)
        assert front_end(written) == ours


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"foo": 1}, "preprocessor.foo is 1, which is not known here"),
        ({"use_torchaudio": True}, "preprocessor.use_torchaudio is True"),
        ({"_target_": "nemo.AudioToMFCCPreprocessor"}, "MFCC.* known is AudioToMelSpectrogramPrep"),
        ({"normalize": {"fixed_mean": [0]}}, "normalize is .*fixed values"),
        ({"window": "kaiser"}, "preprocessor.window is 'kaiser', must be one of 'hann'"),
        ({"window": [1]}, r"preprocessor.window is \[1\], not a string"),
        ({"pad_to": "max"}, "preprocessor.pad_to is 'max', not an integer"),
        ({"n_fft": 200}, "n_fft=200"),
        ({"window_stride": 1e-9}, "window_stride is 1e-09 .which makes 0., must be at least 1"),
        ({"window_size": "0.025", "sample_rate": 1 << 40}, "sample_rate is 1099511627776, not an"),
        ({"window_size": "0.025"}, "window_size is '0.025', not a number of seconds from 0 to 10"),
        ({"window_size": [0.025]}, r"window_size is \[0.025\], which it cannot be"),
        ({"window_stride": None}, "window_stride is None"),
        ({"window_stride": 11}, "window_stride is 11"),
        ({"window_size": float("nan")}, "window_size is nan"),
        ({"sample_rate": "16000"}, "sample_rate is '16000'"),
        ({"sample_rate": 0}, "sample_rate is 0"),
        (None, "no section 'preprocessor'"),
        ([1], r"preprocessor is \[1\], not a mapping"),
    ],
)
def test_what_the_front_end_does_not_have_is_refused(section, reason):
    with pytest.raises(ValueError, match=reason):
        front_end(section)
    with pytest.raises(ValueError, match="htk"):
        write_front_end({"kind": "htk"})


def test_everything_wrong_with_a_section_is_in_one_error():
    with pytest.raises(ValueError) as error:
        encoder(
            {
                "n_layers": 1000,
                "feat_in": 10**9,
                "d_model": "wide",
                "conv_dilation": 2,
                "xscaling": 1,
            }
        )
    for reason in (
        "encoder.n_layers is 1000, must be at least 1 and at most 500",
        "encoder.feat_in is 1000000000, not an integer up to 1048576",
        "encoder.d_model is 'wide', not an integer",
        "encoder.conv_dilation is 2, which is not known here",
        "encoder.xscaling is 1, not true or false",
    ):
        assert reason in str(error.value)


def test_encoders_are_read_and_written_back(shared_dir):
    variants = json.loads((shared_dir / "goldens" / "nemo" / "enc_variants.json").read_text())
    for section in variants.values():
        values = encoder(section)
        back = nemo_sections.write_encoder(values)
        kept = {k: v for k, v in section.items() if k != "pos_emb_max_len"}
        assert {k: back[k] for k in kept} == kept
        assert encoder(back) == values


def test_encoders_are_read_with_their_version_and_gaps():
    section = dict(feat_in=80, n_layers=2, d_model=32, subsampling=None, att_context_size=None)
    config = FastConformerConfig(**encoder(section, legacy=True))
    assert not config.masked_subsampling and config.subsampling_factor == 1
    assert config.contexts == ((-1, -1),) and config.xscaling and config.conv_kernel_size == 31
    assert encoder(section)["masked_subsampling"]
    with pytest.raises(ValueError, match="known is ConformerEncoder"):
        encoder({**section, "_target_": "nemo.SqueezeformerEncoder"})
    with pytest.raises(ValueError, match="subsampling must be one of"):
        encoder({**section, "subsampling": "vggnet", "subsampling_factor": 4})


def test_versions_are_compared_as_numbers():
    for version in ("2.4.0", "1.23.0", "0.11", "", None, "r2.0.0", "2"):
        assert nemo_sections.is_legacy(version)
    for version in ("2.5.0", "2.5.0rc1", "2.5rc1", "2.10.0", "3.0.0"):
        assert not nemo_sections.is_legacy(version)


def test_the_settings_give_nemos_windows_and_filters(shared_dir):
    folder = shared_dir / "goldens" / "nemo"
    cases = json.loads((folder / "preproc_cases.json").read_text())
    with np.load(folder / "preproc.npz") as z:
        compared = [name for name in cases if f"{name}/fb" in z]
        assert len(compared) >= 3
        for name in compared:
            buffers = nemo_weights.featurizer(front_end(cases[name]))
            for key, (shape, compute) in buffers.items():
                want = z[f"{name}/{key.rpartition('.')[2]}"]
                assert shape == want.shape
                np.testing.assert_allclose(compute(), want, atol=1e-6)
