"""Goldens of the reference fast-weight code by name."""

import numpy as np
import pytest


@pytest.fixture
def golden(goldens, request):
    """name -> dict of arrays; the committed ones first, then those in the shared folder."""

    def load(name):
        path = goldens / "fast_weights" / f"{name}.npz"
        if not path.exists():
            path = request.getfixturevalue("shared_dir") / "goldens" / "fast_weights" / path.name
        with np.load(path) as f:
            return dict(f)

    return load
