"""Weighted averages of parameter trees, in memory or streamed from checkpoints leaf by leaf.

The average is a running one in float32 (float64 for float64 leaves): after k trees with weights
w_1..w_k it is acc_k = acc_{k-1} - (acc_{k-1} - x_k) w_k / (w_1 + ... + w_k). Equal trees come out
bit for bit, since the difference is then an exact zero; a plain sum of w_i x_i would round. Leaves
go back to their own dtype at the end.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import re
import warnings

import jax
import numpy as np

from jasr import checkpoint, tree
from jasr.checkpoint import read as checkpoint_read
from jasr.checkpoint.files import MANIFEST, read_manifest, version
from jasr.systems import catalogue, compatibility, source

PROVENANCE = "jasr_average.json"
_BLOCK = 1 << 16  # elements of one pass: accumulator, member and difference stay in cache
_SMALLEST = 1e-4  # metrics below it weigh the same: 1 / 0 would take all


class AverageError(ValueError):
    """These trees or checkpoints cannot be averaged."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A checkpoint that may take part: its directory, step number and metrics."""

    path: pathlib.Path
    step: int
    metrics: dict


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
    flat = [checkpoint.leaves(t) for t in trees]
    names = [f"tree {i}" for i in range(len(trees))]
    _check_agreement([{p: _as_array(x) for p, x in f.items()} for f in flat], names)
    structure = jax.tree.structure(trees[0])
    used = [(f, w) for f, w in zip(flat, weights, strict=True) if w > 0]

    def one(path):
        acc = _Running(flat[0][path])
        for f, w in used:
            acc.add(np.asarray(f[path]), w)
        return acc.result(path, lambda: [np.asarray(f[path]) for f in flat], names)

    with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
        return jax.tree.unflatten(structure, list(pool.map(one, flat[0])))


def average_checkpoints(members, output, weights=None, item="", *, how="given", verify=True):
    """Writes the average of checkpoints as one step directory; returns its provenance.

    The result has the layout of its members: `evaluate`, `transcribe` and training start from it.
    Its trees are the chosen item, under the name "params", and, where the members have them, the
    averaged "batch_stats" and "frozen". Memory: the result and a few leaves.

    Args:
      members: Member or paths of step directories.
      output: the directory to write; only an earlier average is replaced.
      weights: see `average`.
      item: "params", "ema" ...; "" is "ema" if every member has it, else "params".
      how: where the weights come from, for the provenance.
      verify: compare the checksums of the members first.

    Raises:
      AverageError: see `average`; also one checkpoint given twice, an item that is missing, or
        members of different models, front ends or tokenizers.
      CheckpointError: a member is damaged.
    """
    members = [m if isinstance(m, Member) else member(m) for m in members]
    output = pathlib.Path(output).absolute()
    weights = normalised(weights, len(members))
    check_duplicates(members)
    if output.exists() and not (output / PROVENANCE).exists():
        raise AverageError(f"{output} exists and is not an average: choose another --output")
    has = [set(checkpoint.items(m.path)) for m in members]
    item = item or ("ema" if all("ema" in h for h in has) else "params")
    parts = {"params": item}
    parts |= {name: name for name in ("batch_stats", "frozen") if any(name in h for h in has)}
    for m, h in zip(members, has, strict=True):
        for name in set(parts.values()) - h:
            raise AverageError(f"{m.path} has no item {name!r}, only {sorted(h)}")
    metas = [checkpoint.load_meta(m.path) for m in members]
    _check_meaning(metas, members)
    if verify:
        for m in members:
            checkpoint.find_step(m.path, items=tuple(parts.values()))
    state = {name: _stream(members, weights, part) for name, part in parts.items()}
    newest = max(range(len(members)), key=lambda i: members[i].step)
    provenance = {
        "item": item,
        "weights_from": how,
        "jasr": version(),
        "members": [
            {
                "step": m.step,
                "weight": w,
                "metrics": {k: v if math.isfinite(v) else None for k, v in m.metrics.items()},
                "path": str(m.path),
                "manifest_sha256": read_manifest(m.path)["sha256"],
            }
            for m, w in zip(members, weights, strict=True)
        ],
    }
    meta = metas[newest] | {"average": provenance}
    step = members[newest].step
    checkpoint.save_step(output, state, meta, step=step, beside={PROVENANCE: provenance})
    return provenance


def find_members(path):
    """Every checkpoint below a run or checkpoints directory, by step.

    Steps are numbered directories, or named "step=14000-val_wer=0.0652..." (the metrics are then
    read from the name where the checkpoint has none); "...-last" copies are left out.
    """
    path = pathlib.Path(path).absolute()
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = []
    for d in sorted(root.iterdir() if root.is_dir() else ()):
        named = parse_name(d.name)
        if d.is_dir() and (d.name.isdecimal() or "step" in named) and not is_last(d.name):
            if (d / MANIFEST).exists():
                found.append(member(d))
    if not found:
        raise AverageError(f"no checkpoint in {root}: wanted a run or a directory of its steps")
    return sorted(found, key=lambda m: m.step)


def member(path):
    """The Member at a step directory."""
    path = checkpoint.find_step(path, items=())
    named = parse_name(path.name)
    step = path.name if path.name.isdecimal() else named.pop("step", None)
    if step is None:
        step = read_manifest(path)["step"]
    return Member(path, int(step), named | checkpoint.load_metrics(path))


def parse_name(name):
    """{"step": 14000, "val_wer": 0.0652, ...} of "step=14000-val_wer=0.0652-val_loss=1.50.ckpt".

    A step that is no whole number is none.
    """
    values = {}
    for key, text in re.findall(r"(\w+)=(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)", name):
        if key != "step":
            values[key] = float(text)
        elif text.isdecimal():
            values[key] = int(text)
    return values


def is_last(name):
    """Whether a file or directory name marks the last copy of a run: "...-last", "last-v1.ckpt"."""
    return bool(re.search(r"(^|-)last(-v\d+)?(\.\w+)?$", name))


def select(members, top_n=0, steps=(), metric="val_wer", mode="min"):
    """The members with these steps, in this order, or the `top_n` best by a metric, best first.

    Raises:
      AverageError: a step is not there or there twice; too few members have the metric; a negative
        `top_n`.
    """
    if top_n < 0:
        raise AverageError(f"top_n={top_n}: wanted how many of the best, 1 or more")
    if bool(top_n) == bool(steps):
        raise AverageError("choose members by top_n or by steps")
    if steps:
        numbers = [m.step for m in members]
        wrong = [s for s in steps if numbers.count(s) != 1]
        if wrong:
            raise AverageError(f"steps {wrong} are not there once each; there are {numbers}")
        return [members[numbers.index(s)] for s in steps]
    sign = -1 if mode == "max" else 1
    ranked = [m for m in members if not math.isnan(m.metrics.get(metric, math.nan))]
    ranked = sorted(ranked, key=lambda m: (sign * m.metrics[metric], -m.step))
    if len(ranked) < top_n:
        raise AverageError(
            f"{len(ranked)} of {len(members)} checkpoints have the metric {metric!r}, wanted the "
            f"best {top_n}; choose with steps, or another metric"
        )
    return ranked[:top_n]


def weigh(members, weights=None, metric="val_wer", mode="min"):
    """(weights that sum to 1, "given" | "inverse METRIC" | "equal").

    Given weights are used; else, where every member has a metric for which lower is better, they
    are in proportion to 1 / metric; else equal.
    """
    if weights is not None and len(weights):
        return normalised(weights, len(members)), "given"
    values = [m.metrics.get(metric, math.nan) for m in members]
    if mode == "min" and all(math.isfinite(v) and v >= 0 for v in values):
        inverse = [1 / max(v, _SMALLEST) for v in values]
        total = math.fsum(inverse)
        return [v / total for v in inverse], f"inverse {metric}"
    return normalised(None, len(members)), "equal"


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


def check_duplicates(members):
    """Raises AverageError if one checkpoint, or a copy of it, is given twice."""
    seen = {}
    for m in members:
        for key in (m.path.resolve(), read_manifest(m.path)["sha256"]):
            if key in seen:
                raise AverageError(f"{m.path} is the same checkpoint as {seen[key]}")
            seen[key] = m.path


def check_once(members):
    """Raises AverageError if a file or directory, or a copy of it, is there twice."""
    for m, other in itertools.combinations(members, 2):
        if os.path.samefile(m.path, other.path) or _same_content(m.path, other.path):
            raise AverageError(f"{other.path} is the same checkpoint as {m.path}; leave one out")


def _same_content(one, other):
    """Whether two files or directories hold the same bytes: sizes first, then small files first."""
    sizes = []
    for path in (one, other):
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        sizes.append(sorted((p.stat().st_size, str(p.relative_to(path))) for p in files))
    return sizes[0] == sizes[1] and all(_same_bytes(one / n, other / n, s) for s, n in sizes[0])


def _same_bytes(one, other, size, block=1 << 20):
    """Whether two files of a size are equal; from the end, where a zip keeps its checksums."""
    with open(one, "rb") as f, open(other, "rb") as g:
        for start in range(size // block * block, -1, -block):
            f.seek(start)
            g.seek(start)
            if f.read(block) != g.read(block):
                return False
    return True


def _stream(members, weights, item):
    """The average of one item of the members, a leaf at a time, as jax.Arrays on the CPU."""
    readers = [checkpoint_read.Leaves(m.path / item) for m in members]
    names = [str(m.path / item) for m in members]
    _check_agreement([r.kinds for r in readers], names)
    used = [(r, w) for r, w in zip(readers, weights, strict=True) if w > 0]
    kinds, running, flat, cpu = readers[0].kinds, {}, {}, jax.devices("cpu")[0]

    def requests():
        for path, kind in kinds.items():
            acc = running[path] = _Running(kind)
            yield used[0][0], path, acc.sum if acc.sum.dtype == kind.dtype else None
            yield from ((reader, path, None) for reader, _ in used[1:])

    stream = checkpoint_read.read_ahead(requests())
    for path in kinds:
        for _, w in used:
            value = next(stream)
            running[path].add(value, w)
        mean = running.pop(path).result(path, functools.partial(_read_all, readers, path), names)
        if mean.dtype != np.float64:  # Orbax copies numpy arrays, but not JAX's
            mean = jax.block_until_ready(jax.device_put(mean, cpu))
        flat[path] = mean
    return tree.unflatten(flat)


def _read_all(readers, path):
    return [r.read(path) for r in readers]


class _Running:
    """The running weighted mean of one leaf."""

    def __init__(self, first):
        self.dtype = first.dtype
        wide = np.promote_types(self.dtype, np.float32) if _is_numpy(self.dtype) else np.float32
        self.sum = _aligned(first.shape, wide)
        self.weight = 0.0

    def add(self, value, weight):
        self.weight += weight
        if self.weight == weight:  # the first
            if value is not self.sum:  # it was read into place
                np.copyto(self.sum, value, casting="unsafe")
            return
        share = self.sum.dtype.type(weight / self.weight)
        acc, x = self.sum.reshape(-1), np.ascontiguousarray(value).reshape(-1)
        difference = np.empty(min(_BLOCK, acc.size), acc.dtype)
        with np.errstate(all="ignore"):
            for i in range(0, acc.size, _BLOCK):
                a = acc[i : i + _BLOCK]
                d = difference[: a.size]
                # acc - (acc - x) share, not acc + (x - acc) share: -0.0 stays -0.0
                np.subtract(a, x[i : i + _BLOCK], out=d)
                np.multiply(d, share, out=d)
                np.subtract(a, d, out=a)

    def result(self, path, values, names):
        """The mean in the leaf's dtype; `values()` rereads the members to name a bad one."""
        with np.errstate(all="ignore"):
            total = self.sum.sum()  # not finite if a value is not; faster than to ask each
        if not np.isfinite(total) and not np.isfinite(self.sum).all():
            for name, value in zip(names, values(), strict=True):
                if not np.isfinite(value.astype(self.sum.dtype)).all():
                    raise AverageError(f"{path} of {name} has NaN or infinite values")
            raise AverageError(f"{path} overflows {self.sum.dtype} when averaged")
        return self.sum if self.sum.dtype == self.dtype else self.sum.astype(self.dtype)


def _check_agreement(flat, names):
    for path, leaf in flat[0].items():
        if not jax.numpy.issubdtype(leaf.dtype, np.floating):
            raise AverageError(
                f"{path} of {names[0]} is {leaf.dtype}: only floating-point leaves can be "
                "averaged; take counters and codes from one checkpoint"
            )
    for other, name in zip(flat[1:], names[1:], strict=True):
        try:
            tree.compare(flat[0], other, dtype=True, what=f"{name} beside {names[0]}")
        except tree.TreeError as e:
            raise AverageError(str(e)) from None


def _check_meaning(metas, members):
    """Parameters of equal shapes are not the same parameters with another vocabulary or model."""
    for meta, m in zip(metas[1:], members[1:], strict=True):
        both = f"{m.path} and {members[0].path} differ in"
        if catalogue.today(meta.get("task")) != catalogue.today(metas[0].get("task")):
            raise AverageError(f"{both} their task")
        if meta.get("tokenizer") != metas[0].get("tokenizer"):
            raise AverageError(f"{both} their tokenizer")
        known = [[(o["item"], o["sha256"]) for o in source.origins(x)] for x in (metas[0], meta)]
        if known[0] != known[1]:
            raise AverageError(f"{both} their frozen_from: frozen parameters are not the same")
        changes = compatibility.differences(*(x.get("config", {}) for x in (metas[0], meta)))
        if changes:
            raise AverageError(f"{both} config: {compatibility.listed(changes)}")


def _as_array(x):
    return x if hasattr(x, "dtype") and hasattr(x, "shape") else np.asarray(x)


def _aligned(shape, dtype):
    """An empty array at a multiple of 64 bytes, which JAX takes over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _is_numpy(dtype):
    return np.dtype(dtype).kind == "f"


def _threads():
    return min(8, os.cpu_count() or 1)
