"""`import jasr`: everything promised is there, loaded at first use, in any order of imports."""

import numpy as np
import pytest

import jasr


def test_names_and_version():
    assert {"from_pretrained", "transcribe", "load_params", "average"} <= set(dir(jasr))
    assert jasr.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'transcibe'"):
        jasr.transcibe  # noqa: B018


def test_average_takes_trees_and_weights():
    trees = [{"a": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)}]
    np.testing.assert_allclose(jasr.average(trees, weights=[0.25, 0.75])["a"], 0.75)
    np.testing.assert_allclose(jasr.average(trees)["a"], 0.5)


def test_functions_are_their_modules_functions():
    from jasr import averaging, checkpoint
    from jasr.recognition import recognizer

    assert jasr.load_params is checkpoint.load_params
    assert jasr.from_pretrained is recognizer.from_pretrained
    assert jasr.average is averaging.average
    with pytest.raises(Exception, match="nowhere"):
        jasr.transcribe("nowhere", ["a.wav"])
