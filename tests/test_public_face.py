"""`import jasr`: everything promised is there, loaded at first use, in any order of imports."""

import importlib
import subprocess
import sys

import numpy as np
import pytest

import jasr


def test_names_and_version():
    assert {"from_pretrained", "transcribe", "load_params", "average"} <= set(dir(jasr))
    assert jasr.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'transcibe'"):
        jasr.transcibe  # noqa: B018


def test_average_is_a_function_and_a_module():
    trees = [{"a": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)}]
    averaged = jasr.average(trees, weights=[0.25, 0.75])
    np.testing.assert_allclose(averaged["a"], 0.75)
    module = importlib.import_module("jasr.average")
    assert module.average is not module and jasr.average is module
    np.testing.assert_allclose(jasr.average(trees)["a"], 0.5)


def test_functions_are_their_modules_functions():
    from jasr import checkpoint, transcribe

    assert jasr.load_params is checkpoint.load_params
    assert jasr.from_pretrained is transcribe.from_pretrained
    with pytest.raises(Exception, match="nowhere"):
        jasr.transcribe("nowhere", ["a.wav"])


@pytest.mark.parametrize("first", ["jasr", "jasr.transcribe", "jasr.average"])
def test_import_order_does_not_matter(first, root):
    program = f"import {first}, jasr; print(callable(jasr.transcribe), callable(jasr.average))"
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert ran.stdout == "True True\n", ran.stderr
