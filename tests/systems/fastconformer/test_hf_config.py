"""Settings of Parakeet directories: what is not known is named, with its value; nothing raises
anything but HfError."""

import copy
import json

import pytest

from jasr.systems.fastconformer import hf_config
from jasr.systems.fastconformer.hf_config import HARMLESS, HfError

ENCODER = {"num_mel_bins": 80, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256}
CTC = {
    "model_type": "parakeet_ctc",
    "vocab_size": 65,
    "pad_token_id": 64,
    "encoder_config": ENCODER,
}
TDT = {
    "model_type": "parakeet_tdt",
    "vocab_size": 65,
    "pad_token_id": 2,
    "blank_token_id": 64,
    "decoder_hidden_size": 48,
    "num_decoder_layers": 1,
    "hidden_act": "relu",
    "max_symbols_per_step": 10,
    "durations": [0, 1, 2],
    "encoder_config": ENCODER,
}
EXTRACTOR = {"feature_size": 80, "sampling_rate": 16000}


def changed(config, **changes):
    """The config with values at dotted (here "__") places."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        *path, name = key.split("__")
        target = config
        for part in path:
            target = target[part]
        target[name] = value
    return config


def test_what_is_not_given_has_transformers_defaults():
    kind, sections, size = hf_config.read(TDT, EXTRACTOR)
    assert (kind, size) == ("tdt", 64)
    encoder, front_end = sections["encoder"], sections["front_end"]
    # ParakeetEncoderConfig's and ParakeetFeatureExtractor's, not NeMo's 31, 4 and 4
    names = ("conv_kernel_size", "subsampling_factor", "n_heads", "xscaling")
    assert [encoder[name] for name in names] == [9, 8, 8, True]
    assert (front_end["preemph"], front_end["hop"]) == (0.97, 160)
    none = hf_config.read(TDT, {**EXTRACTOR, "preemphasis": None})[1]["front_end"]
    assert none["preemph"] == 0.0


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        (CTC, {"pad_token_id": 0}, "pad_token_id is 0: the blank must be .* vocab_size - 1 = 64"),
        (CTC, {"pad_token_id": None}, "pad_token_id is None"),
        (TDT, {"blank_token_id": 63}, "blank_token_id is 63: .* vocab_size - 1 = 64"),
        (TDT, {"vocab_size": 66}, "blank_token_id is 64: .* = 65"),
    ],
)
def test_a_blank_that_is_not_the_last_id_is_refused(config, changes, reason):
    with pytest.raises(HfError, match=reason):
        hf_config.read(changed(config, **changes), EXTRACTOR)
    hf_config.read(changed(TDT, pad_token_id=7), EXTRACTOR)  # no blank of a transducer's


def test_a_blank_that_is_not_given_is_transformers_default():
    without = {key: value for key, value in CTC.items() if key != "pad_token_id"}
    with pytest.raises(HfError, match="pad_token_id is 1024 by default"):
        hf_config.read(without, EXTRACTOR)
    assert hf_config.read({**without, "vocab_size": 1025}, EXTRACTOR)[2] == 1024


def test_keys_that_are_not_known_are_listed_with_their_values():
    config = changed(CTC, durations=[1], encoder_config__brand_new_norm="weird", jasr={"los": {}})
    config["encoder_config"]["num_key_value_heads"] = 2
    extractor = {**EXTRACTOR, "do_normalize": False, "dither": 0.1, "padding_value": 1.0}
    with pytest.raises(HfError) as error:
        hf_config.read(config, extractor)
    for reason in (
        "durations is [1]",
        "encoder_config.brand_new_norm is 'weird'",
        "encoder_config.num_key_value_heads is 2",
        "feature_extractor.do_normalize is False",
        "feature_extractor.dither is 0.1",
        "feature_extractor.padding_value is 1.0",
        "jasr.los is {}",
    ):
        assert reason in str(error.value)
    with pytest.raises(HfError, match="jasr.encoder.n_layers"):  # said by num_hidden_layers
        hf_config.read({**CTC, "jasr": {"encoder": {"n_layers": 3}}}, EXTRACTOR)
    with pytest.raises(HfError, match="jasr.loss.kind is 'tdt', where another key says 'ctc'"):
        hf_config.read({**CTC, "jasr": {"loss": {"kind": "tdt"}}}, EXTRACTOR)


def test_keys_without_meaning_are_accepted():
    every = dict.fromkeys(HARMLESS - {"model_type", "pad_token_id"}, "anything")
    usual = {"do_normalize": True, "padding_value": 0, "padding_side": "right"}
    config = {**CTC, **every, "encoder_config": {**every, **ENCODER}}
    assert hf_config.read(config, {**EXTRACTOR, **usual}) == hf_config.read(CTC, EXTRACTOR)


@pytest.mark.parametrize("name", ["CTC", "RNNT", "TDT"])
def test_whatever_transformers_itself_writes_is_known(name):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = getattr(transformers, f"Parakeet{name}Config")()
    for use_diff in (True, False):
        written = json.loads(config.to_json_string(use_diff=use_diff))
        assert hf_config.read(written, EXTRACTOR)[0] == name.lower()
    generation = transformers.GenerationConfig._get_default_generation_params()
    assert set(generation) <= HARMLESS


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"encoder_config": [1]}, r"encoder_config is \[1\], not a mapping"),
        ({"encoder_config": "x"}, "encoder_config is 'x', not a mapping"),
        ({"jasr": [1]}, r"jasr is \[1\], not a mapping"),
        ({"vocab_size": "65"}, "vocab_size is '65', not an integer"),
        ({"encoder_config__hidden_size": 0}, "encoder_config.hidden_size is 0, must be at least 1"),
        ({"encoder_config__attention_bias": 1}, "attention_bias is 1, not true or false"),
        ({"encoder_config__dropout": float("nan")}, "dropout is nan, not a number"),
        ({"max_symbols_per_step": None}, "max_symbols_per_step is None, not an integer"),
        ({"durations": "012"}, "durations is '012', not a list"),
        ({"hidden_act": 3}, "hidden_act is 3, not a string"),
    ],
)
def test_values_of_another_type_are_named(changes, reason):
    with pytest.raises(HfError, match=reason):
        hf_config.read(changed(TDT, **changes), EXTRACTOR)


def test_no_value_at_any_place_raises_another_kind_of_error():
    config = {**TDT, "jasr": {name: {} for name in "front_end encoder decoder joint loss".split()}}
    sections = hf_config.read(config, EXTRACTOR)[1]
    for name in config["jasr"]:
        config["jasr"][name] = dict.fromkeys(sections[name], 1)
    theirs = [row.key.partition(".")[2] for row in hf_config.ENCODER]
    places = [(key,) for key in config]
    places += [("encoder_config", key) for key in theirs]
    places += [("jasr", name, key) for name in config["jasr"] for key in sections[name]]
    for place in places:
        for value in (None, 0, -1, 1e300, 10**400, "x", [], [1], {}, {"a": 1}, True):
            given = copy.deepcopy(config)
            given["jasr"] = {place[1]: {}} if place[0] == "jasr" and len(place) > 1 else {}
            target = given
            for part in place[:-1]:
                target = target[part]
            target[place[-1]] = value
            try:
                hf_config.read(given, EXTRACTOR)
            except ValueError as e:
                assert type(e).__module__.startswith("jasr."), (place, value, e)
