from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.systems import compatibility


def config(**model):
    return {"task": "ctc", "model": model, "front_end": {"hop": 160}}


def test_harmless_fields_are_not_differences():
    ours = config(
        dropout=0.3, remat=True, dtype="bfloat16", ctc_vocab_size=7, batch_norm="reference"
    )
    assert compatibility.differences(config(), ours) == {}


def test_fields_that_change_the_arithmetic_are_listed_with_both_values():
    found = compatibility.differences(config(), config(rope_theta=5e5, norm_eps=1e-5))
    assert found == {"model.rope_theta": (1e4, 5e5), "model.norm_eps": (1e-6, 1e-5)}
    assert "model.rope_theta (10000.0 -> 500000.0)" in compatibility.listed(found)


def test_a_field_that_a_config_lacks_has_its_default_and_json_lists_are_tuples():
    ours = config(lact_every=1, intermediate_ctc=[2]) | {"front_end": {}}
    assert compatibility.differences(config(intermediate_ctc=(2,)), ours) == {}


def test_another_task_is_the_only_difference_that_is_said_but_old_names_are_none():
    assert compatibility.differences(config(), config() | {"task": "x"}) == {"task": ("lact", "x")}
    assert compatibility.differences(config(), config() | {"task": "lact"}) == {}


def test_a_section_is_compared_whatever_systems_it_comes_from():
    ours, theirs = {"n_layers": 2, "dropout": 0.3}, {"n_layers": 4}
    found = compatibility.section_differences(FastConformerConfig, theirs, ours, "model.encoder")
    assert found == {"model.encoder.n_layers": (4, 2)}


def test_nested_settings_and_the_durations_of_tdt_are_compared():
    tdt = {"task": "parakeet", "model": {"encoder": {"d_model": 64, "dropout": 0.3}}}
    ours = {"task": "parakeet", "model": {"encoder": {"d_model": 32}}}
    ours["loss"] = {"durations": [0, 1, 2]}
    assert compatibility.differences(tdt, ours) == {
        "model.encoder.d_model": (64, 32),
        "loss.durations": ((0, 1, 2, 3, 4), (0, 1, 2)),
    }
    ctc = {"task": "parakeet", "model": {"kind": "ctc"}, "loss": {"kind": "ctc"}}
    assert set(compatibility.differences(tdt, ctc)) == {
        "model.kind", "model.encoder.d_model", "loss.kind"
    }  # fmt: skip
