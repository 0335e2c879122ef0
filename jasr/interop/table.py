r"""Weights renamed by a table: rows of (source regex, target path, transform), checked in both
directions, and inverted for export.

    TABLE = (
        Row(r"layers\.(\d+)\.attn\.qkv\.weight", r"params/layers_\1/attn/qkv/kernel", "linear"),
        Row(r"experts\.(\d+)\.weight", "params/experts/kernel", "linear"),     # stacked on axis 0
        Row(r"in_proj", ("params/q/kernel", "params/k/kernel"), "linear", axis=1),  # cut in two
        Row((r"embed\.weight", r"head\.weight"), "params/embedding"),          # tied: equal
        Row(r"q\.(?:base_layer\.)?weight", "params/q/kernel", (Halves(16), "linear")),
        Row(r"layers\.(\d+)\.norm\.num_batches_tracked", None),                # dropped
    )
    params = table.convert(TABLE, state_dict, want)
    state_dict = table.invert(TABLE, params)

`torch_rows` makes the table of a model that keeps torch's names.

Weights are array-likes of `jasr.interop.lazy`; nothing is read here but what must be equal.
"""

import re
import types
import typing

import numpy as np

from jasr import tree
from jasr.interop import lazy


class Axes(typing.NamedTuple):
    """The source's axes in the target's order."""

    order: tuple[int, ...]

    def forward(self, x):
        if len(x.shape) != len(self.order):
            raise ValueError(f"has {len(x.shape)} axes, {NAMES[self]} takes {len(self.order)}")
        return lazy.transpose(x, self.order)

    def back(self, x):
        return lazy.transpose(x, tuple(int(n) for n in np.argsort(self.order)))


class Reshape(typing.NamedTuple):
    """The source's shape and the target's; one size of each may be -1."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def forward(self, x):
        return lazy.reshape(x, _shape(x, self.ours))

    def back(self, x):
        return lazy.reshape(x, _shape(x, self.theirs))


class Halves(typing.NamedTuple):
    """Rows of rotary pairs, of so many heads: the source's pairs stand side by side (0, 1 of a head
    are a pair), the target's in two halves of the head (0 and D/2 are a pair)."""

    heads: int

    def forward(self, x):
        return lazy.rows(x, self._pairs(x).transpose(0, 2, 1).reshape(-1))

    def back(self, x):
        return lazy.rows(x, np.argsort(self._pairs(x).transpose(0, 2, 1).reshape(-1)))

    def _pairs(self, x):
        if not x.shape or x.shape[0] % (2 * self.heads):
            raise ValueError(f"has {tuple(x.shape)}, no pairs of rows for {self.heads} heads")
        return np.arange(x.shape[0]).reshape(self.heads, -1, 2)


def _shape(x, wanted):
    size, known = int(np.prod(x.shape)), -int(np.prod(wanted))
    shape = tuple(size // known if -1 in wanted and n == -1 and known else n for n in wanted)
    if int(np.prod(shape)) != size:
        raise ValueError(f"has {tuple(x.shape)}, which does not become {wanted}")
    return shape


# By name: no transform, and those of torch's layers.
TRANSFORMS = {
    "none": (),
    "linear": (Axes((1, 0)),),  # torch [out, in] -> kernel [in, out]
    "conv1d": (Axes((2, 1, 0)),),  # torch [out, in, width] -> kernel [width, in, out]
    "conv2d": (Axes((2, 3, 1, 0)),),  # torch [out, in, h, w] -> kernel [h, w, in, out]
}
NAMES = {steps[0]: name for name, steps in TRANSFORMS.items() if steps}


class Row(typing.NamedTuple):
    """One kind of weight.

    source: regex of the whole source key. Several: names of one and the same weight, of which at
      least one is there; those that are must be equal, and all are written.
    target: its path, in which \\1 is the first group; None where the weight is dropped. Several:
      the weight is cut into these along `axis`, in the sizes that they have.
    transform: a name in TRANSFORMS, a transform (Axes, Reshape, Halves), or several, in order.
    axis: of the transformed weight, where it is cut; of the leaf, where weights are stacked: those
      that differ in one group only, which the target does not hold, are put there by its number.
    copies: weights that differ in that group, 0 to copies - 1, are not stacked but equal.

    To be inverted, `source` must consist of plain text, escaped characters, groups, and optional
    parts (?:...)?, which are not written.
    """

    source: str | tuple
    target: str | tuple | None
    transform: typing.Any = "none"
    axis: int = 0
    copies: int = 0

    @property
    def sources(self):
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @property
    def targets(self):
        return self.target if isinstance(self.target, tuple) else (self.target,)

    @property
    def free(self):
        """The number of the group that no target holds; 0 if they hold all."""
        held = {int(n) for t in self.targets for n in re.findall(r"\\(\d)", t or "")}
        count = re.compile(self.sources[0]).groups
        return next((n for n in range(1, count + 1) if n not in held), 0)

    @property
    def stacked(self):
        return bool(self.free) and not self.copies

    def forward(self, x):
        for step in self._steps():
            x = step.forward(x)
        return x

    def back(self, x):
        for step in reversed(self._steps()):
            x = step.back(x)
        return x

    def _steps(self):
        given = self.transform
        given = given if type(given) is tuple else (given,)
        return [step for g in given for step in (TRANSFORMS[g] if isinstance(g, str) else (g,))]


class TableError(ValueError):
    """Weights and table, or weights and model, do not fit; the message lists everything."""


# ---- a table of torch's names --------------------------------------------------------------------

# What torch calls our leaves, and how kernels of so many axes lie there.
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_LEAVES |= {"mean": "running_mean", "var": "running_var"}
_KERNELS = {2: "linear", 3: "conv1d", 4: "conv2d"}


def torch_rows(want, names=types.MappingProxyType({})):
    r"""The rows of a model whose parameters have torch's names, dots as slashes and list indices
    joined by "_": layers.0.norm.weight is params/layers_0/norm/scale.

    Args:
      want: the model's {"params", "batch_stats"}, trees of leaves with shapes.
      names: {a part of our paths: what it is in torch}, where the names differ.
    """
    found = {}  # {(source, target, transform): for each leaf the list of its numbers}
    for path, leaf in tree.flatten(want).items():
        kind, *parts, last = path.split("/")
        source, target, numbers = [], [kind], []
        for part in parts:
            stem, _, number = part.rpartition("_")
            if part in names or not number.isdecimal():
                source.append(re.escape(names.get(part, part)))
                target.append(part)
            else:
                numbers.append(number)
                source.append(rf"{stem}\.%s")
                target.append(rf"{stem}_\{len(numbers)}")
        key = r"\.".join([*source, _LEAVES.get(last, last)]), "/".join([*target, last])
        transform = _KERNELS[len(leaf.shape)] if last == "kernel" else "none"
        found.setdefault((*key, transform), []).append(numbers)
    rows = [Row(r".*\.num_batches_tracked", None)]
    for (source, target, transform), numbers in found.items():
        groups = (f"({'|'.join(dict.fromkeys(group))})" for group in zip(*numbers, strict=True))
        rows.append(Row(source % tuple(groups), target, transform))
    return tuple(rows)


# ---- their names to ours -------------------------------------------------------------------------


def convert(rows, weights, want, *, what="the weights"):
    """The tree of `weights` under the names and axes of the model, in their own dtypes.

    Args:
      rows: the table; each source key must be matched by exactly one row. Rows that match nothing
        are for other variants of the model.
      weights: {source key: array-like}.
      want: tree with the shapes and dtypes to be filled, e.g. from jax.eval_shape.
      what: the words for the weights in the error, e.g. a path.

    Raises:
      TableError: keys without a row or with two, targets that are missing, unexpected, filled
        twice, or of another shape or (unless both are floats) dtype, names of one weight that
        differ, all of them in one error.
    """
    compiled = [(re.compile(s), row) for row in rows for s in row.sources]
    flat_want, result, problems, origin, stacks = tree.flatten(want), {}, [], {}, {}
    for key, array in weights.items():
        hits = [(row, m) for pattern, row in compiled if (m := pattern.fullmatch(key))]
        if len(hits) != 1:
            count = "no row" if not hits else f"{len(hits)} rows"
            problems.append(f"+ {key} {tuple(array.shape)}: {count} of the table for it")
            continue
        ((row, match),) = hits
        if row.target is None:
            continue
        paths = [match.expand(target) for target in row.targets]
        shown = f"{key} {tuple(array.shape)} -> {', '.join(paths)}"
        if row.stacked:
            stack = stacks.setdefault(paths[0], (row, {}))[1]
            if _number(match[row.free]) in stack:
                problems.append(f"+ {shown}: filled already")
            stack[_number(match[row.free])] = key, array
            origin.setdefault(paths[0], key)
        elif before := next((origin[p] for p in paths if p in origin), None):
            if not row.copies and len(row.sources) == 1:
                problems.append(f"+ {key}: {paths[0]} was filled by {before} already")
            elif not lazy.same(array, weights[before]):
                problems.append(f"~ {shown}: differs from {before}, another name of this weight")
        else:
            origin |= dict.fromkeys(paths, key)
            try:
                result |= _cut(row, array, paths, flat_want)
            except ValueError as e:
                problems.append(f"{'+' if 'in the model' in str(e) else '~'} {shown}: {e}")
    for path, (row, pieces) in stacks.items():
        try:
            result[path] = _stacked(row, pieces, path, flat_want)
        except ValueError as e:
            problems.append(f"~ {origin[path]} ... -> {path}: {e}")
    problems += [f"- {p} {tuple(v.shape)}" for p, v in flat_want.items() if p not in origin]
    if problems:
        raise TableError(_listing(what, problems))
    return tree.unflatten({path: result[path] for path in flat_want})


def _number(text):
    return int(text) if text.isdecimal() else text


def _cut(row, array, paths, flat_want):
    """{path: leaf} of one weight."""
    if missing := [p for p in paths if p not in flat_want]:
        where = "" if len(paths) == 1 else f"{missing[0]}: "
        raise ValueError(f"{where}not in the model")
    array = row.forward(array)
    if len(paths) == 1:
        _check(array, flat_want[paths[0]])
        return {paths[0]: array}
    sizes = [flat_want[p].shape[row.axis] for p in paths]
    if sum(sizes) != array.shape[row.axis]:
        raise ValueError(
            f"gives {tuple(array.shape)}, which {sizes} do not share on axis {row.axis}"
        )
    found, done = {}, 0
    for path, size in zip(paths, sizes, strict=True):
        found[path] = lazy.part(array, row.axis, done, done + size)
        _check(found[path], flat_want[path])
        done += size
    return found


def _stacked(row, pieces, path, flat_want):
    """The leaf of weights {number: (key, array)}."""
    if path not in flat_want:
        raise ValueError("not in the model")
    count = flat_want[path].shape[row.axis]
    if set(pieces) != set(range(count)):
        missing = [n for n in range(count) if n not in pieces]
        more = sorted(str(key) for n, (key, _) in pieces.items() if n not in range(count))
        raise ValueError(f"{count} are stacked; missing {missing}, unexpected {more}")
    arrays = [row.forward(pieces[n][1]) for n in range(count)]
    kinds = {(tuple(a.shape), np.dtype(a.dtype)) for a in arrays}
    if len(kinds) > 1:
        raise ValueError(f"{sorted(map(str, kinds))} cannot be stacked")
    made = lazy.stack(arrays, row.axis)
    _check(made, flat_want[path])
    return made


def _check(array, want):
    if tuple(array.shape) != tuple(want.shape):
        raise ValueError(f"gives {tuple(array.shape)}, the model has {tuple(want.shape)}")
    if array.dtype != want.dtype and not (_is_float(array.dtype) and _is_float(want.dtype)):
        raise ValueError(f"is {array.dtype}, the model has {np.dtype(want.dtype)}")


def _is_float(dtype):
    return np.dtype(dtype).kind in "fV"  # ml_dtypes' floats are of kind V


def _listing(what, problems):
    shown = "\n  ".join(problems[:300])
    more = f"\n  ... and {len(problems) - 300} more" if len(problems) > 300 else ""
    return (
        f"{what} do not fit (- missing, + unexpected, ~ different; {len(problems)} in all):\n"
        f"  {shown}{more}"
    )


# ---- our names to theirs -------------------------------------------------------------------------


def invert(rows, params, *, what="the parameters"):
    """{source key: array-like} that `convert` would turn into `params`; dropped weights are not in
    it.

    Args:
      params: tree of array-likes, or {path: array-like}.

    Raises:
      TableError: lists every path that no row, or more than one, leads to, and cuts of a weight
        that are missing.
    """
    patterns = [
        (_target_pattern(row, target), row, number)
        for row in rows
        if row.target is not None
        for number, target in enumerate(row.targets)
    ]
    flat, result, problems, cuts = tree.flatten(params), {}, [], {}
    for path, array in flat.items():
        hits = [(row, n, m) for p, row, n in patterns if (m := p.fullmatch(path))]
        if len(hits) != 1:
            count = "no row" if not hits else f"{len(hits)} rows"
            problems.append(f"+ {path} {tuple(array.shape)}: {count} of the table for it")
            continue
        ((row, number, match),) = hits
        groups = {int(name[1:]): text for name, text in match.groupdict().items()}
        if len(row.targets) > 1:
            key = _source_key(row, row.sources[0], groups)
            cuts.setdefault(key, (row, groups, {}))[2][number] = array
        elif row.stacked:
            for n in range(array.shape[row.axis]):
                piece = row.back(lazy.entry(array, row.axis, n))
                result |= _named(row, {**groups, row.free: str(n)}, piece)
        else:
            result |= _named(row, groups, row.back(array))
    for key, (row, groups, parts) in cuts.items():
        if missing := [t for n, t in enumerate(row.targets) if n not in parts]:
            problems.append(f"- {', '.join(missing)}: a part of {key}")
            continue
        whole = lazy.concatenate([parts[n] for n in range(len(row.targets))], row.axis)
        result |= _named(row, groups, row.back(whole))
    if problems:
        raise TableError(_listing(what, problems))
    return result


def _named(row, groups, array):
    """{key: array} of every name of one weight."""
    given = [groups]
    if row.free and row.free not in groups:
        given = [{**groups, row.free: str(n)} for n in range(row.copies)]
    return {_source_key(row, source, g): array for g in given for source in row.sources}


_GROUP = re.compile(r"\((?!\?)[^()]*\)")
_OPTIONAL = re.compile(r"\(\?:[^()]*\)\?")


def _target_pattern(row, target):
    """Regex of the paths that a row leads to: its target with each \\n replaced by group n."""
    groups = _GROUP.findall(_OPTIONAL.sub("", row.sources[0]))
    seen, parts = set(), []
    for part in re.split(r"(\\\d)", target):
        if not re.fullmatch(r"\\\d", part):
            parts.append(re.escape(part))
        elif part in seen:
            parts.append(f"(?P=g{part[1]})")
        else:
            seen.add(part)
            parts.append(f"(?P<g{part[1]}>{groups[int(part[1]) - 1][1:-1]})")
    numbered = len(groups) - 1 if row.free and groups[row.free - 1] in (r"(\d+)", "(0)") else -1
    if len(seen) not in (len(groups), numbered):
        raise TableError(f"{row} cannot be inverted: its target must hold every group but a number")
    return re.compile("".join(parts))


def _source_key(row, source, groups):
    """The source key that leads to a matched path."""
    number = iter(range(1, 10))
    plain = _OPTIONAL.sub("", source)
    key = _GROUP.sub(lambda _: groups[next(number)].replace("\\", r"\\"), plain)
    key = re.sub(r"\\(.)", r"\1", key)
    if not re.fullmatch(source, key):
        raise TableError(
            f"{row} cannot be inverted: its source must be plain text, escapes and groups"
        )
    return key
