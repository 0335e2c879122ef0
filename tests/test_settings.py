import dataclasses

import pytest

from jasr import settings


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 4


@dataclasses.dataclass(frozen=True)
class Outer:
    rate: float = 0.1
    name: str = "x"
    sizes: tuple = ()
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
    value = Outer(rate=1.0, sizes=((1, 2), (3, 4)), inner=Inner(8))
    loaded = {"rate": 1, "name": "x", "sizes": [[1, 2], [3, 4]], "on": False, "inner": {"width": 8}}
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
