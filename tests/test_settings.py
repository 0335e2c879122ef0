import dataclasses

import pytest

from jasr import settings


@settings.section
class Inner:
    width: int = settings.field(4, least=1)


@settings.section
class Outer:
    rate: float = settings.field(0.1, above=0, below=1)
    name: str = settings.field("x", choices=("x", "y"))
    sizes: tuple = ()
    counts: tuple = settings.field((), least=1, most=9)
    limit: int | None = settings.field(None, least=0)
    on: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_misspelt_key_is_named_with_the_nearest_one():
    with pytest.raises(settings.SettingsError, match=r"config\.optim\.raet .*'rate'"):
        settings.build(Outer, {"raet": 1.0}, "config.optim")


def test_wrong_kind_of_value_is_named():
    for key, value in (("rate", "fast"), ("rate", True), ("name", 3), ("sizes", 3), ("on", 1)):
        with pytest.raises(settings.SettingsError, match=f"c.{key}"):
            settings.build(Outer, {key: value}, "c")


def test_json_round_trip_keeps_types():
    value = Outer(rate=0.5, sizes=((1, 2), (3, 4)), inner=Inner(8))
    loaded = {
        "rate": 0.5,
        "name": "x",
        "sizes": [[1, 2], [3, 4]],
        "on": False,
        "inner": {"width": 8},
    }
    assert settings.build(Outer, loaded, "c") == value
    assert settings.build(Outer, settings.to_dict(value), "c") == value


def test_nested_key_is_named_by_its_whole_path():
    with pytest.raises(settings.SettingsError, match=r"c\.inner\.widht"):
        settings.build(Outer, {"inner": {"widht": 3}}, "c")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.5, True])
def test_what_is_no_whole_number_is_refused_for_one(value):
    with pytest.raises(settings.SettingsError, match=r"c\.width must be int"):
        settings.build(Inner, {"width": value}, "c")
    assert settings.build(Inner, {"width": 2.0}, "c").width == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rate": 1.0}, "c.rate must be above 0 and below 1, got 1.0"),
        ({"rate": float("nan")}, "c.rate must be above 0 and below 1, got nan"),
        ({"name": "z"}, "c.name must be one of 'x', 'y', got 'z'"),
        ({"counts": [3, 10]}, "c.counts must be at least 1 and at most 9, got (3, 10)"),
        ({"counts": [3, "a"]}, "c.counts must be at least 1 and at most 9, got (3, 'a')"),
        ({"limit": -1}, "c.limit must be at least 0, got -1"),
        ({"inner": {"width": 0}}, "c.inner.width must be at least 1, got 0"),
    ],
)
def test_a_value_beyond_its_limits_is_named_with_its_path_and_the_limits(values, said):
    with pytest.raises(settings.SettingsError) as error:
        settings.build(Outer, values, "c")
    assert str(error.value) == said
    assert settings.build(Outer, {"limit": None}, "c").limit is None


def test_settings_that_are_made_without_build_keep_the_same_limits():
    with pytest.raises(settings.SettingsError, match="Inner.width must be at least 1, got 0"):
        Inner(0)
    with pytest.raises(settings.SettingsError, match="Outer.rate must be above 0"):
        dataclasses.replace(Outer(), rate=-1.0)


def test_what_two_fields_say_together_is_asked_after_each_alone():
    @settings.section
    class Both:
        a: int = settings.field(1, least=1)
        b: int = 2

        def __post_init__(self):
            if self.b % self.a:
                raise ValueError("b is no multiple of a")

    with pytest.raises(ValueError, match="no multiple"):
        Both(3, 4)
    with pytest.raises(settings.SettingsError, match="Both.a must be at least 1"):
        Both(0, 4)  # and no division by zero
