import re

import numpy as np
import pytest

from jasr import tree

PARAMS = {"a": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "b": {"kernel": np.ones((3, 4))}}
PATHS = ["a/kernel", "a/bias", "b/kernel"]


def test_flatten_names_leaves_by_path_and_unflatten_undoes_it():
    flat = tree.flatten(PARAMS)
    assert list(flat) == PATHS
    assert tree.unflatten(flat) == PARAMS


def test_path_through_a_leaf_raises():
    with pytest.raises(tree.TreeError, match="leaf"):
        tree.unflatten({"a": 1, "a/b": 2})
    with pytest.raises(tree.TreeError, match="twice|branch"):
        tree.unflatten({"a/b": 1, "a": 2})


def test_first_rule_that_matches_the_whole_path_wins():
    got = tree.match([("a/.*", 1), (".*/kernel", 2)], PATHS)
    assert got == {"a/kernel": 1, "a/bias": 1, "b/kernel": 2}


def test_path_without_a_rule_raises():
    with pytest.raises(tree.TreeError, match="no rule matches a/bias"):
        tree.match([(".*/kernel", 1)], PATHS)
    assert "a/bias" not in tree.match([(".*/kernel", 1)], PATHS, optional=True)


def test_rule_that_matches_nothing_raises():
    with pytest.raises(tree.TreeError, match=re.escape("'.*/kernle'")):
        tree.match([(".*/kernle", 1), (".*", 2)], PATHS)


def test_rule_shadowed_by_an_earlier_one_is_not_dead():
    assert tree.match([(".*", 1), ("a/bias", 2)], PATHS)["a/bias"] == 1


def test_split_and_merge_are_inverse():
    ours, rest = tree.split(PARAMS, {"a/bias"})
    assert ours == {"a": {"bias": PARAMS["a"]["bias"]}}
    assert tree.flatten(tree.merge(ours, rest)).keys() == set(PATHS)
    with pytest.raises(tree.TreeError, match="two"):
        tree.merge(PARAMS, ours)


def test_compare_lists_every_difference_in_one_error():
    got = {"a": {"kernel": np.ones((2, 4)), "scale": np.ones(3)}, "b": PARAMS["b"]}
    with pytest.raises(tree.TreeError) as error:
        tree.compare(PARAMS, got)
    text = str(error.value)
    assert "- a/bias (3,)" in text and "+ a/scale (3,)" in text
    assert "~ a/kernel is (2, 4), wanted (2, 3)" in text


def test_compare_sees_dtypes_on_request():
    got = {**PARAMS, "b": {"kernel": np.ones((3, 4), np.float32)}}
    tree.compare(PARAMS, got)
    with pytest.raises(tree.TreeError, match="float32, wanted float64"):
        tree.compare(PARAMS, got, dtype=True)


def test_count_adds_up_elements():
    assert tree.count(PARAMS) == 6 + 3 + 12
