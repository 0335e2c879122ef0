"""Arrays that are read when somebody asks for them, and views of them.

An array-like has `shape`, `dtype` and slices. numpy arrays (also mapped from a file) are, and stay
what they are where numpy has a view; everything else becomes a `Lazy`, which reads no more of its
source than the slices that are asked of it.
"""

import math
import operator

import numpy as np


class Lazy:
    """An array that is read by slices.

    Attributes: shape, dtype, ndim, size (elements), nbytes (bytes).

    Args:
      shape, dtype: of the whole array.
      read: (one slice an axis, with start and stop, of step 1) -> numpy array of that stretch.
      read_into: reads all into an array of this shape and dtype; None: by a copy of `read`'s.
    """

    def __init__(self, shape, dtype, read, read_into=None):
        self.shape, self.dtype, self._read = tuple(shape), np.dtype(dtype), read
        self._into = read_into
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at, missing = index.index(Ellipsis), self.ndim + 1 - len(index)
            index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
        index = (*index, *[slice(None)] * (self.ndim - len(index)))
        spans, inside = [], []
        for i, n in zip(index, self.shape, strict=True):
            if isinstance(i, slice):
                start, stop, step = i.indices(n)
                if step != 1:
                    return np.asarray(self)[index]
                spans.append(slice(start, max(start, stop)))
                inside.append(slice(None))
            else:
                start = range(n)[operator.index(i)]
                spans.append(slice(start, start + 1))
                inside.append(0)
        return self._read(tuple(spans))[tuple(inside)]

    def read_into(self, out):
        """`out`, an array of this shape and dtype, with the whole array in it."""
        if self._into:
            self._into(out)
        else:
            np.copyto(out, np.asarray(self))
        return out

    def __array__(self, dtype=None, copy=None):
        value = self._read(tuple(slice(0, n) for n in self.shape))
        return np.array(value, dtype) if copy else np.asarray(value, dtype)


def transpose(x, axes):
    """The array with its axes in another order, as numpy's transpose."""
    if isinstance(x, np.ndarray):
        return x.transpose(axes)
    back = [axes.index(n) for n in range(len(axes))]
    shape = [x.shape[n] for n in axes]
    return Lazy(shape, x.dtype, lambda at: x[tuple(at[n] for n in back)].transpose(axes))


def reshape(x, shape):
    """The array in another shape; what numpy has no view of is read whole when it is asked for."""
    if isinstance(x, np.ndarray) and x.flags.c_contiguous:
        return x.reshape(shape)
    return Lazy(shape, x.dtype, lambda at: np.asarray(x).reshape(shape)[at])


def rows(x, order):
    """The array with the rows (axis 0) `order`, a permutation; only those asked for are read where
    numpy can pick them."""
    if not isinstance(x, np.ndarray):
        return Lazy(x.shape, x.dtype, lambda at: np.asarray(x)[order][at])
    return Lazy(x.shape, x.dtype, lambda at: x[(order[at[0]], *at[1:])])


def part(x, axis, start, stop):
    """The stretch [start, stop) of an axis."""
    if isinstance(x, np.ndarray):
        return x[(*[slice(None)] * axis, slice(start, stop))]
    shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])

    def read(at):
        moved = slice(start + at[axis].start, start + at[axis].stop)
        return x[(*at[:axis], moved, *at[axis + 1 :])]

    return Lazy(shape, x.dtype, read)


def entry(x, axis, number):
    """The array at a place of an axis, which goes."""
    thin = part(x, axis, number, number + 1)
    if isinstance(x, np.ndarray):
        return thin[(*[slice(None)] * axis, 0)]
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])

    def read(at):
        return thin[(*at[:axis], slice(0, 1), *at[axis:])].reshape([a.stop - a.start for a in at])

    return Lazy(shape, x.dtype, read)


def stack(xs, axis):
    """Arrays of one shape and dtype along a new axis; only those asked for are read."""
    shape = list(xs[0].shape)
    shape.insert(axis, len(xs))

    def read(at):
        inner = (*at[:axis], *at[axis + 1 :])
        return np.stack([np.asarray(x[inner]) for x in xs[at[axis]]], axis)

    return Lazy(shape, xs[0].dtype, read)


def concatenate(xs, axis):
    """Arrays behind each other along an axis."""
    ends = np.cumsum([x.shape[axis] for x in xs]).tolist()
    shape = (*xs[0].shape[:axis], ends[-1], *xs[0].shape[axis + 1 :])

    def read(at):
        found = []
        for x, end in zip(xs, ends, strict=True):
            start = end - x.shape[axis]
            low, high = max(at[axis].start - start, 0), min(at[axis].stop, end) - start
            if low < high or at[axis].start == at[axis].stop:
                found.append(
                    np.asarray(x[(*at[:axis], slice(low, max(low, high)), *at[axis + 1 :])])
                )
        return np.concatenate(found, axis)

    return Lazy(shape, xs[0].dtype, read)


def cast(x, dtype):
    """The array in another dtype, cast when it is read."""
    if x.dtype == dtype:
        return x
    return Lazy(x.shape, dtype, lambda at: np.asarray(x[at]).astype(dtype))


def same(x, other):
    """Whether two array-likes hold the same bits; the same memory is not read."""
    if x is other:
        return True
    if x.shape != other.shape or x.dtype != other.dtype:
        return False
    if isinstance(x, np.ndarray) and isinstance(other, np.ndarray):
        if (x.ctypes.data, x.strides) == (other.ctypes.data, other.strides):
            return True
    x, other = (np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in (x, other))
    return bool(np.array_equal(x, other))


def empty(shape, dtype):
    """An array at a multiple of 64 bytes, where JAX on CPUs uses it without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def owned(x, dtype=None):
    """The array in memory of its own, in C order, as `empty` places it.

    dtype: what it is cast to; None: its own.
    """
    value, dtype = np.asarray(x), np.dtype(dtype or x.dtype)
    fresh = value is not x and value.flags.writeable and value.flags.c_contiguous
    if fresh and value.dtype == dtype and value.ctypes.data % 64 == 0:
        return value  # it was read for this
    copy = empty(value.shape, dtype)
    np.copyto(copy, value, casting="unsafe")
    return copy
