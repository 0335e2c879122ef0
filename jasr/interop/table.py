r"""Weights renamed by a table: rows of (source regex, target path, transform), checked in both
directions, and inverted for export.

    TABLE = (
        Row(r"layers\.(\d+)\.attn\.qkv\.weight", r"params/layers_\1/attn/qkv/kernel", "linear"),
        Row(r"layers\.(\d+)\.norm\.num_batches_tracked", None),  # dropped
    )
    params = table.convert(TABLE, state_dict, want)
    state_dict = table.invert(TABLE, params)
"""

import re
import typing

import numpy as np

from jasr import tree

# Named transforms: the source's axes in the target's order. Their inverses follow.
TRANSFORMS = {
    "none": None,
    "linear": (1, 0),  # torch [out, in] -> kernel [in, out]
    "conv1d": (2, 1, 0),  # torch [out, in, width] -> kernel [width, in, out]
    "conv2d": (2, 3, 1, 0),  # torch [out, in, height, width] -> kernel [height, width, in, out]
}


class Row(typing.NamedTuple):
    """One kind of weight: `source` matches the whole source key; `target` is its path, in which \\1
    is the first group, or None where the weight is dropped; `transform` names one of TRANSFORMS.

    To be inverted, `source` must consist of plain text, escaped characters and groups.
    """

    source: str
    target: str | None
    transform: str = "none"


class TableError(ValueError):
    """Weights and table, or weights and model, do not fit; the message lists everything."""


def convert(rows, weights, want, *, what="the weights"):
    """The tree of `weights` under the names, axes and dtypes of the model.

    Args:
      rows: the table; each source key must be matched by exactly one row. Rows that match nothing
        are for other variants of the model.
      weights: {source key: array}.
      want: tree with the shapes and dtypes to be filled, e.g. from jax.eval_shape. Floats are cast
        to the wanted float dtype; arrays that need no cast stay views.
      what: the words for the weights in the error, e.g. a path.

    Raises:
      TableError: keys without a row or with two, targets that are missing, unexpected, filled
        twice, or of another shape or (unless both are floats) dtype, all of them in one error.
    """
    compiled = [(re.compile(row.source), row) for row in rows]
    flat_want, result, problems, origin = tree.flatten(want), {}, [], {}
    for key, array in weights.items():
        hits = [(row, m) for pattern, row in compiled if (m := pattern.fullmatch(key))]
        if len(hits) != 1:
            count = "no row" if not hits else f"{len(hits)} rows"
            problems.append(f"+ {key} {tuple(array.shape)}: {count} of the table for it")
            continue
        (row, match) = hits[0]
        if row.target is None:
            continue
        path = match.expand(row.target)
        if path in origin:
            problems.append(f"+ {key}: {path} was filled by {origin[path]} already")
            continue
        origin[path] = key
        if path not in flat_want:
            problems.append(f"+ {key} {tuple(array.shape)} -> {path}: not in the model")
            continue
        result[path], problem = _fit(array, row.transform, flat_want[path])
        if problem:
            problems.append(f"~ {key} {tuple(array.shape)} -> {path}: {problem}")
    problems += [f"- {p} {tuple(v.shape)}" for p, v in flat_want.items() if p not in origin]
    if problems:
        raise TableError(_listing(what, problems))
    return tree.unflatten({path: result[path] for path in flat_want})


def _fit(array, transform, want):
    """(the array in the wanted axes and dtype, what is wrong or None)."""
    axes = TRANSFORMS[transform]
    array = np.asarray(array)
    if axes is not None:
        if array.ndim != len(axes):
            return None, f"has {array.ndim} axes, {transform} takes {len(axes)}"
        array = array.transpose(axes)
    if array.shape != tuple(want.shape):
        return None, f"gives {array.shape}, the model has {tuple(want.shape)}"
    if array.dtype != want.dtype and not (_is_float(array.dtype) and _is_float(want.dtype)):
        return None, f"is {array.dtype}, the model has {np.dtype(want.dtype)}"
    return array.astype(want.dtype, copy=False), None


def _is_float(dtype):
    return np.dtype(dtype).kind in "fV"  # ml_dtypes' floats are of kind V


def _listing(what, problems):
    shown = "\n  ".join(problems[:300])
    more = f"\n  ... and {len(problems) - 300} more" if len(problems) > 300 else ""
    return (
        f"{what} do not fit (- missing, + unexpected, ~ different; {len(problems)} in all):\n"
        f"  {shown}{more}"
    )


def invert(rows, params, *, what="the parameters"):
    """{source key: array} that `convert` would turn into `params`; dropped weights are not in it.

    Raises:
      TableError: lists every path that no row, or more than one, leads to.
    """
    rows = [row for row in rows if row.target is not None]
    patterns = [(_target_pattern(row), row) for row in rows]
    result, problems = {}, []
    for path, array in tree.flatten(params).items():
        hits = [(row, m) for pattern, row in patterns if (m := pattern.fullmatch(path))]
        if len(hits) != 1:
            count = "no row" if not hits else f"{len(hits)} rows"
            problems.append(f"+ {path} {tuple(array.shape)}: {count} of the table for it")
            continue
        (row, match) = hits[0]
        key = _source_key(row, match)
        axes = TRANSFORMS[row.transform]
        array = np.asarray(array)
        result[key] = array if axes is None else array.transpose(np.argsort(axes))
    if problems:
        raise TableError(_listing(what, problems))
    return result


_GROUP = re.compile(r"\((?!\?)[^()]*\)")


def _target_pattern(row):
    """Regex of the paths that a row leads to: its target with each \\n replaced by group n."""
    groups = _GROUP.findall(row.source)
    seen, parts = set(), []
    for part in re.split(r"(\\\d)", row.target):
        if not re.fullmatch(r"\\\d", part):
            parts.append(re.escape(part))
        elif part in seen:
            parts.append(f"(?P=g{part[1]})")
        else:
            seen.add(part)
            parts.append(f"(?P<g{part[1]}>{groups[int(part[1]) - 1][1:-1]})")
    if len(seen) != len(groups):
        raise TableError(f"{row} cannot be inverted: its target must hold every group")
    return re.compile("".join(parts))


def _source_key(row, match):
    """The source key that leads to a matched path."""
    number = iter(range(1, 10))
    key = _GROUP.sub(lambda _: match[f"g{next(number)}"].replace("\\", r"\\"), row.source)
    key = re.sub(r"\\(.)", r"\1", key)
    if not re.fullmatch(row.source, key):
        raise TableError(
            f"{row} cannot be inverted: its source must be plain text, escapes and groups"
        )
    return key
