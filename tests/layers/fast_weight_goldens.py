"""Goldens of the reference fast-weight code: comparing, and torch's names as ours."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

# Compiled with little optimisation: these graphs run once, and compiling is what a test waits for.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def error(got, want):
    """Largest difference as a share of the largest value."""
    want = np.asarray(want)
    top = np.max(np.abs(want), initial=0.0)
    return float(np.max(np.abs(np.asarray(got) - want), initial=0.0) / (top or 1.0))


def close(got, want, limit):
    """Asserts `error` <= limit for every leaf of a flat dict, naming those beyond it."""
    assert set(got) == set(want)
    off = {k: e for k in want if not (e := error(got[k], want[k])) <= limit}
    assert not off, json.dumps(off, indent=1)


def close_gradients(got, want, limit):
    """`close` for the gradients of a LaCT layer or model.

    The biases of learning rates and momentum are measured against their kernels' gradients: Muon
    cancels a common factor of all rates, so such a bias's gradient is a sum of terms up to hundreds
    of times its size, and arithmetic in f64 itself lies up to 3e-3 of it away from the f32 goldens.
    """
    got, want = dict(got), dict(want)
    biases = ("lr_proj/bias", "momentum_proj_0/bias")
    for name in [k for k in want if k.endswith(biases)]:
        top = np.max(np.abs(want[name[:-4] + "kernel"]))
        assert np.max(np.abs(got.pop(name) - want.pop(name))) <= limit * top, name
    close(got, want, limit)


def torch_tree(arrays, prefix):
    """The nested parameter dict of the arrays "prefix + torch name", as jasr names them."""
    out = {}
    for key, x in arrays.items():
        if not key.startswith(prefix):
            continue
        names = []
        for part in key[len(prefix) :].split("."):
            if part.isdigit():
                names[-1] += f"_{part}"
            else:
                names.append(part)
        if names[-1] == "weight":
            names[-1] = "scale" if x.ndim == 1 else "kernel"
            x = np.transpose(x)  # linear [in, out], convolution [k, in, out]
        names[-1] = {"running_mean": "mean", "running_var": "var"}.get(names[-1], names[-1])
        node = out
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = jnp.asarray(x)
    return out
