"""Systems by name, and their options."""

import collections

import pytest

from configs import common
from jasr.systems import catalogue, loading


def test_old_names_are_those_of_today_in_recipes_and_users_configs():
    for old, new in (("ctc", "lact"), ("parakeet", "fastconformer")):
        assert catalogue.get(old) is catalogue.get(new) and catalogue.today(old) == new
        assert common.default(old).task == common.default(new).task == new


def test_unknown_names_are_refused_with_the_known_ones():
    for name in ("lakt", None):
        with pytest.raises(ValueError, match=r"choose from \['fastconformer', 'lact'\]"):
            loading.build({"task": name}, None)
    with pytest.raises(ValueError, match="did you mean 'lact'"):
        catalogue.get("lakt")


def test_options_of_one_name_are_the_same_in_every_system_that_has_them():
    flags = collections.defaultdict(set)
    for system in catalogue.every():
        for verb, options in system.options.items():
            for name, flag in options.flags.items():
                flags[verb, name].add((flag.help, flag.choices))
    assert not [name for name, kinds in flags.items() if len(kinds) > 1]


def test_a_row_is_all_that_a_further_system_needs(monkeypatch):
    monkeypatch.setitem(catalogue.SYSTEMS, "other", "jasr.systems.lact:SYSTEM")
    assert len(catalogue.every()) == 3
    assert catalogue.get("other") is catalogue.get("lact")
