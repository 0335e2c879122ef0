import dataclasses

from jasr import meaning


def config(**model):
    return {"task": "ctc", "model": model, "front_end": {"hop": 160}}


def test_harmless_fields_are_not_differences():
    ours = config(
        dropout=0.3, remat=True, dtype="bfloat16", ctc_vocab_size=7, batch_norm="reference"
    )
    assert meaning.differences(config(), ours) == {}


def test_fields_that_change_the_arithmetic_are_listed_with_both_values():
    found = meaning.differences(config(), config(rope_theta=5e5, norm_eps=1e-5) | {"task": "x"})
    assert found == {
        "task": ("ctc", "x"), "model.rope_theta": (1e4, 5e5), "model.norm_eps": (1e-6, 1e-5),
    }  # fmt: skip
    assert "model.rope_theta (10000.0 -> 500000.0)" in meaning.listed(found)


def test_a_field_that_a_config_lacks_has_its_default_and_json_lists_are_tuples():
    ours = config(lact_every=1, intermediate_ctc=[2]) | {"front_end": {}}
    assert meaning.differences(config(intermediate_ctc=(2,)), ours) == {}


def test_every_harmless_name_is_a_field():
    fields = {
        f"{section}.{f.name}"
        for section, cls in meaning.SECTIONS.items()
        for f in dataclasses.fields(cls)
    }
    assert fields >= meaning.HARMLESS
