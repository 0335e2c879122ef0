"""Weighted means of array-likes, leaf by leaf.

The mean is a running one in float32 (float64 for float64 leaves): after k stores with weights
w_1..w_k it is acc_k = acc_{k-1} - (acc_{k-1} - x_k) w_k / (w_1 + ... + w_k). Equal stores come out
bit for bit, since the difference is then an exact zero; a plain sum of w_i x_i would round. Leaves
go back to their own dtype at the end.
"""

import concurrent.futures
import math
import os
import threading
import warnings

import jax
import numpy as np

from jasr import checkpoint, tree
from jasr.interop import lazy

_BLOCK = 1 << 16  # elements of one pass: accumulator, member and difference stay in cache
_THREADS = min(8, os.cpu_count() or 1)


class AverageError(ValueError):
    """These trees or checkpoints cannot be averaged."""


def average(trees, weights=None):
    """The weighted average of trees of arrays, as a tree of numpy arrays.

    Args:
      trees: at least one pytree; names, shapes and dtypes must agree.
      weights: a number a tree, finite and not negative; equal if None. Weights that do not sum to
        1 are divided by their sum, with a warning.

    Raises:
      AverageError: integer leaves (a mean of counters or codes means nothing), drift of names,
        shapes or dtypes, NaN or infinity, unusable weights.
    """
    trees = list(trees)
    weights = normalised(weights, len(trees))
    stores = [{p: _as_array(x) for p, x in checkpoint.leaves(t).items()} for t in trees]
    found = means(stores, weights, [f"tree {i}" for i in range(len(trees))])
    return jax.tree.unflatten(jax.tree.structure(trees[0]), list(found.values()))


def means(stores, weights, names):
    """{path: numpy array}, the mean of every leaf; memory: the result and a leaf a thread.

    Args:
      stores: of each member {path: array-like}, which is read once. weights: they sum to 1.
      names: of the members, for the errors, which are those of `average`.
    """
    check_floats(stores[0], names[0])
    check_same(stores, names)
    used = [(store, w) for store, w in zip(stores, weights, strict=True) if w > 0]
    rooms = threading.local()  # fresh memory for every leaf would cost as much as reading it

    def one(path):
        dtype, so_far = stores[0][path].dtype, 0.0
        wide = np.promote_types(dtype, np.float32) if dtype.kind == "f" else np.float32
        mean = lazy.empty(stores[0][path].shape, wide)
        for store, weight in used:
            so_far += weight
            _add(mean, store[path], weight / so_far, rooms)
        with np.errstate(all="ignore"):
            total = mean.sum()  # not finite if a value is not; faster than to ask each
        if not np.isfinite(total) and not np.isfinite(mean).all():
            raise AverageError(_fault(path, stores, names, wide))
        return mean if wide == dtype else mean.astype(dtype)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(stores[0], pool.map(one, stores[0]), strict=True))


def _add(mean, value, share, rooms):
    """Moves a running mean by this share towards the value; a share of 1 is the first value."""
    if share == 1:
        if isinstance(value, lazy.Lazy) and value.dtype == mean.dtype:
            value.read_into(mean)
        else:
            np.copyto(mean, np.asarray(value), casting="unsafe")
        return
    if isinstance(value, lazy.Lazy):
        if getattr(rooms, "room", np.empty(0)).nbytes < value.nbytes:
            rooms.room = lazy.empty([value.nbytes], np.uint8)
        room = rooms.room[: value.nbytes].view(value.dtype).reshape(value.shape)
        value = value.read_into(room)
    acc, x = mean.reshape(-1), np.ascontiguousarray(value).reshape(-1)
    difference = np.empty(min(_BLOCK, acc.size), acc.dtype)
    with np.errstate(all="ignore"):
        for i in range(0, acc.size, _BLOCK):
            a = acc[i : i + _BLOCK]
            d = difference[: a.size]
            # acc - (acc - x) share, not acc + (x - acc) share: -0.0 stays -0.0
            np.subtract(a, x[i : i + _BLOCK], out=d)
            np.multiply(d, acc.dtype.type(share), out=d)
            np.subtract(a, d, out=a)


def _fault(path, stores, names, dtype):
    """Why a mean is not finite; the members are read again to name a bad one."""
    for name, store in zip(names, stores, strict=True):
        if not np.isfinite(np.asarray(store[path]).astype(dtype)).all():
            return f"{path} of {name} has NaN or infinite values"
    return f"{path} overflows {np.dtype(dtype)} when averaged"


def normalised(weights, count):
    """Weights as a list of floats that sums to 1; equal ones if None."""
    if count < 1:
        raise AverageError("nothing to average")
    if weights is None:
        return [1 / count] * count
    weights = [float(w) for w in weights]
    if len(weights) != count:
        raise AverageError(f"{len(weights)} weights for {count} members")
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise AverageError(f"weights must be finite and not negative, got {weights}")
    total = math.fsum(weights)
    if total == 0:
        raise AverageError("all weights are 0")
    if abs(total - 1) > 1e-6:
        text = f"weights sum to {total:g}, not 1: they are divided by it"
        warnings.warn(text, UserWarning, stacklevel=3)
    return [w / total for w in weights]


def check_floats(store, name):
    """Raises AverageError for a leaf that has no mean."""
    for path, leaf in store.items():
        if not jax.numpy.issubdtype(leaf.dtype, np.floating):
            raise AverageError(
                f"{path} of {name} is {leaf.dtype}: only floating-point leaves can be averaged; "
                "take counters and codes from one checkpoint"
            )


def check_same(stores, names):
    """Raises AverageError, with every difference, unless all have the same names and kinds."""
    for other, name in zip(stores[1:], names[1:], strict=True):
        try:
            tree.compare(stores[0], other, dtype=True, what=f"{name} beside {names[0]}")
        except tree.TreeError as e:
            raise AverageError(str(e)) from None


def _as_array(x):
    return x if hasattr(x, "dtype") and hasattr(x, "shape") else np.asarray(x)
