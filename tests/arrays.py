"""Goldens as arrays."""

import numpy as np


def golden_in(goldens, request, folder="fast_weights"):
    """name -> dict of arrays of tests/goldens/`folder`, else of the shared fast weights (skips
    without)."""

    def load(name):
        path = goldens / folder / f"{name}.npz"
        if not path.exists():
            path = request.getfixturevalue("shared_dir") / "goldens" / "fast_weights" / path.name
        with np.load(path) as f:
            return dict(f)

    return load
