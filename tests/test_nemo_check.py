"""third_party/nemo/check.py: what it calls a difference."""

import runpy
import sys

import numpy as np
import pytest


@pytest.fixture
def apart(root, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script puts its folder there
    return runpy.run_path(str(root / "third_party" / "nemo" / "check.py"))["apart"]


def test_values_that_are_not_finite_are_never_the_same(apart):
    theirs, lengths = np.full((2, 4, 3), 2.0), [4, 2]
    ours = theirs.copy()
    ours[1, 2:] = np.nan  # beyond the length
    assert apart(ours, theirs, lengths) == 0
    ours[0, 1, 1] = 3
    assert apart(ours, theirs, lengths) == 0.5
    assert apart(ours[..., :2], theirs, lengths) == np.inf
    for bad in (np.nan, np.inf):
        for both in (False, True):
            one, two = theirs.copy(), theirs.copy()
            one[1, 1, 0] = bad
            two[1, 1, 0] = bad if both else 2
            assert apart(one, two, lengths) == apart(two, one, lengths) == np.inf
