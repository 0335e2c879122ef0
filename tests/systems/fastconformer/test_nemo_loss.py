"""NeMo's transducer losses as our settings, under the names that NeMo looks their numbers up by."""

import pytest

from jasr.systems.fastconformer import nemo_config
from tests.systems.fastconformer import nemo_models

NUMBERS = {"fastemit_lambda": 0.005, "clamp": 1.0}
TDT = {"durations": [0, 1, 4], "sigma": 0.05, "omega": 0.1}


def config_of(goldens, name):
    config = nemo_models.config_of(goldens, name)
    config["joint"]["num_classes"] = config["decoder"]["vocab_size"] = 64
    return config


@pytest.mark.parametrize("name", ["default", None, "warprnnt_numba"])
def test_the_numbers_of_the_default_loss_are_warprnnt_numbas(goldens, name):
    config = config_of(goldens, "rnnt")
    config["loss"] = {"loss_name": name, "warprnnt_numba_kwargs": NUMBERS}
    settings, _ = nemo_config.parse(config)
    assert settings.sections["loss"] == {"kind": "rnnt", "reduction": "mean_batch", **NUMBERS}
    for base in (None, config):
        written = nemo_config.write(settings, ["x"] * 64, base)
        assert written["loss"] == {
            "loss_name": "warprnnt_numba",
            "warprnnt_numba_kwargs": NUMBERS,
        }
        assert nemo_config.parse(written)[0].sections["loss"] == settings.sections["loss"]


def test_the_numbers_of_a_tdt_loss_come_back(goldens):
    config = config_of(goldens, "tdt")
    config["loss"] = {"loss_name": "tdt", "tdt_kwargs": {**NUMBERS, **TDT}}
    config["joint"]["num_extra_outputs"] = 3
    settings, _ = nemo_config.parse(config)
    loss = settings.sections["loss"]
    assert loss == {
        "kind": "tdt", "reduction": "mean_batch", **NUMBERS, **TDT, "durations": (0, 1, 4),
    }  # fmt: skip
    written = nemo_config.write(settings, ["x"] * 64, config)
    assert written["loss"] == config["loss"] and written["decoding"]["durations"] == [0, 1, 4]


def read(nemo):
    """The loss of a transducer's config; ValueError lists its problems."""
    problems = []
    loss = nemo_config.read_loss(nemo, False, problems)
    if problems:
        raise ValueError("; ".join(problems))
    return loss


def test_what_is_not_said_is_nemos_default():
    usual = {"reduction": "mean_batch", "fastemit_lambda": 0.0, "clamp": -1.0}
    for section in ({}, {"loss": None}, {"loss": {"warprnnt_numba_kwargs": None}}):
        assert read(section) == {"kind": "rnnt", **usual}
    tdt = {"loss_name": "tdt", "tdt_kwargs": {"clamp": None, "sigma": None}}
    got = read({"loss": tdt, "decoding": {"durations": [1, 0]}, "rnnt_reduction": "sum"})
    want = {**usual, "kind": "tdt", "reduction": "sum", "sigma": 0.0, "omega": 0.0}
    assert got == {**want, "durations": (1, 0)}


def test_numbers_that_nemos_implementation_does_not_read_are_noted():
    loss = {"loss_name": "pytorch", "pytorch_kwargs": NUMBERS}
    with pytest.warns(UserWarning) as noted:
        assert read({"loss": loss})["clamp"] == -1.0
    assert [str(w.message)[:41] for w in noted] == [
        "loss.pytorch_kwargs.fastemit_lambda of th",
        "loss.pytorch_kwargs.clamp of the file is ",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("durations", [-1, 0, 1, 2, 3]),
        ("durations", [0, 0, 0, 0, 0]),
        ("durations", [0, 0, 1]),
        ("durations", [0]),
        ("durations", [0, 1.5]),
        ("durations", [False, True]),
        ("durations", "abcde"),
        ("durations", 3),
        ("durations", [0, 10**12]),
        ("durations", []),
        ("sigma", -0.1),
        ("sigma", float("nan")),
        ("omega", -3),
        ("omega", 1.5),
        ("fastemit_lambda", -1),
        ("fastemit_lambda", "much"),
        ("clamp", [1]),
    ],
)
def test_numbers_that_no_tdt_loss_has_are_named(key, value):
    numbers = {**NUMBERS, **TDT, key: value}
    with pytest.raises(ValueError, match=rf"^loss\.tdt_kwargs\.{key} is (missing|.+)$"):
        read({"loss": {"loss_name": "tdt", "tdt_kwargs": numbers}})


def test_everything_wrong_with_a_loss_is_in_one_error(goldens):
    config = config_of(goldens, "hybrid_tdt")
    config["loss"] = {"loss_name": "tdt", "tdt_kwargs": {"durations": 7, "omega": 2}}
    config["aux_ctc"]["ctc_reduction"] = "foo"
    with pytest.raises(nemo_config.ConfigError) as error:
        nemo_config.parse(config)
    for reason in ("durations is 7", "omega is 2", "ctc_reduction is 'foo', must be one of 'mean'"):
        assert reason in str(error.value)
    with pytest.raises(ValueError, match="rnnt_reduction is 'foo'"):
        read({"rnnt_reduction": "foo"})


@pytest.mark.parametrize(
    ("greedy", "want"),
    [
        ({}, 10),
        ({"max_symbols": 5, "max_symbols_per_step": 3}, 5),
        ({"max_symbols": None, "max_symbols_per_step": 3}, 3),
        ({"max_symbols": 0, "max_symbols_per_step": 3}, 3),
        ({"max_symbols_per_step": 3}, 3),
        ({"max_symbols": None}, None),
        ({"max_symbols": None, "max_symbols_per_step": None}, None),
    ],
)
def test_max_symbols_is_nemos_of_its_two_names(goldens, greedy, want):
    config = config_of(goldens, "rnnt")
    config["decoding"]["greedy"] = greedy
    settings, _ = nemo_config.parse(config)
    assert settings.sections["decoding"]["max_symbols"] == (want or 0)
    written = nemo_config.write(settings, ["x"] * 64, config)["decoding"]["greedy"]
    assert (written["max_symbols"] or written.get("max_symbols_per_step")) == want  # as NeMo reads
    config["decoding"]["greedy"] = {"max_symbols": "many"}
    with pytest.raises(nemo_config.ConfigError, match="max_symbols is 'many'"):
        nemo_config.parse(config)
