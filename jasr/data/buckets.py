"""Shapes of batches: which lengths share a bucket, how many rows it has, and what fills it."""

import numpy as np

from jasr.data.config import DataError

CHECKS = ("none", "files", "header", "decode", "auto")


def round_up(x, multiple):
    """The least multiple that is not below x."""
    return -(-x // multiple) * multiple


def rounded(size, multiple):
    """The least size of a first axis that is not below: with one more, a multiple."""
    return round_up(size + 1, multiple) - 1


def best_edges(sizes, count, multiple, limit):
    """Ascending upper edges of sizes i64[M]: at most `count` buckets, the least padding in them.

    Dynamic programming over a histogram with steps of `multiple` (wider ones where the range has
    more than 512 of them). The last edge is `limit`.
    """
    step = multiple * -(-limit // (multiple * 512))
    bins = limit // step + 1
    number = np.minimum(sizes // step, bins - 1)
    rows = np.append(0, np.cumsum(np.bincount(number, minlength=bins)))
    tops = np.arange(1, bins + 1) * step - 1
    cost = (rows[None, 1:] - rows[:, None]) * tops.astype(float)  # a bucket of bins i..j
    cost[np.arange(bins + 1)[:, None] > np.arange(bins)[None, :]] = np.inf
    best, choices = cost[0], []
    for _ in range(count - 1):
        through = best[:, None] + cost[1:]  # the bucket before ends at bin i, this one at j
        before = np.argmin(through, axis=0)
        value = through[before, np.arange(bins)]
        choices.append(np.where(value < best, before, -1))
        best = np.minimum(best, value)
    edges, end = [limit], bins - 1
    for before in reversed(choices):
        if before[end] >= 0:
            end = int(before[end])
            edges.append(int(tops[end]))
    return edges[::-1]


def other_limits(first, sizes, edges, most):
    """Ascending sizes of another axis that each bucket holds: enough for 99.5 % of its rows, in the
    last for all.

    first, sizes: i64[M] of the rows on the first axis, which has the `edges`, and on the other one.
    Rows with more text than their length suggests go to a longer bucket, so that a few of them
    do not widen the text of every batch.
    """
    bucket = np.searchsorted(edges, first)
    limits = []
    for b in range(len(edges) - 1):
        inside = sizes[bucket == b]
        limits.append(int(np.ceil(np.quantile(inside, 0.995))) if len(inside) else 1)
    return np.minimum(np.maximum.accumulate([*limits, most]), most).tolist()


def explicit(cfg, layout):
    """i64[K,n]: sizes of data.bucket_duration_bins; 0 stands for "not given"; K = 0 without it.

    An utterance of just an edge's duration fits, be it longer than declared by the tolerance.
    """
    pairs = [b if isinstance(b, (tuple, list)) else (b,) for b in cfg.bucket_duration_bins]
    given = np.zeros((len(pairs), len(layout.axes)))
    for row, pair in zip(given, pairs, strict=True):
        row[: len(pair)] = pair
    sizes, _ = layout.drawn(given, np.zeros((len(pairs), 2), np.uint64))
    sizes[given == 0] = 0
    if (np.diff(sizes, axis=0) < 0).any() or (np.diff(sizes[:, 0]) == 0).any():
        raise DataError(f"data.bucket_duration_bins must ascend: {cfg.bucket_duration_bins}")
    return sizes * sizes.astype(bool).all(axis=0)


def batch_sizes(cfg, layout, shapes, evaluation=False):
    """Rows of the global batches of buckets with rows of these sizes i64[K,n].

    Evaluation has buckets of its own; where sizes were given for those of training, its batches
    cost as much as the largest of them.
    """
    sizes, multiple = list(cfg.bucket_batch_size), cfg.batch_multiple
    most = cfg.batch_cost or int(cfg.batch_duration * cfg.sample_rate)
    if len(sizes) == 1:
        sizes = sizes * len(shapes)
        if evaluation:
            sizes = [round_up(rows, multiple) for rows in sizes]
    elif evaluation:
        costs = layout.cost(explicit(cfg, layout)).tolist()
        most = max((b * c for b, c in zip(sizes, costs, strict=False)), default=most)
        sizes = []
    if not sizes:
        costs = layout.cost(shapes).tolist()
        return [max(multiple, int(most // c) // multiple * multiple) for c in costs]
    if len(sizes) != len(shapes):
        raise DataError(
            f"data.bucket_batch_size has {len(sizes)} numbers, but there are {len(shapes)} buckets"
        )
    if wrong := [rows for rows in sizes if rows < 1 or rows % multiple]:
        raise DataError(
            f"data.bucket_batch_size {wrong}: not multiples of data.batch_multiple={multiple}"
        )
    return sizes


def fill(bucket, sizes, order):
    """[(bucket, rows)] of batches, longest first: each bucket's rows in the given order; what the
    last batch lacks is taken from the buckets below, so that at most one batch is not full."""
    waiting = [order[bucket[order] == b] for b in range(len(sizes))]
    batches = []
    for b in reversed(range(len(sizes))):
        rows = waiting[b]
        for below in reversed(range(b)):
            missing = -len(rows) % sizes[b]
            rows = np.concatenate([rows, waiting[below][:missing]])
            waiting[below] = waiting[below][missing:]
        batches += [(b, rows[i : i + sizes[b]]) for i in range(0, len(rows), sizes[b])]
    return batches


def check(cfg):
    """Raises DataError on settings that no index or plan can follow."""
    if cfg.check not in CHECKS:
        raise DataError(f"data.check must be one of {', '.join(CHECKS)}, got {cfg.check!r}")
    for name in ("num_buckets", "batch_multiple", "length_multiple", "token_multiple", "concat"):
        if getattr(cfg, name) < 1:
            raise DataError(f"data.{name} must be at least 1, got {getattr(cfg, name)}")
    if not cfg.speeds or min(cfg.speeds) <= 0 or len(cfg.speeds) > 255:
        raise DataError(f"data.speeds must be factors above 0, got {cfg.speeds}")
    if len(cfg.concat_gap) != 2 or not 0 <= cfg.concat_gap[0] <= cfg.concat_gap[1]:
        raise DataError(f"data.concat_gap must be (least, most) seconds, got {cfg.concat_gap}")
    if not cfg.bucket_batch_size and cfg.batch_duration <= 0 and cfg.batch_cost <= 0:
        raise DataError("data.batch_duration must be above 0, or give data.bucket_batch_size")
