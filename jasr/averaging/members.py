"""Members of an average: found by name, chosen by step or metric, weighed."""

import dataclasses
import filecmp
import itertools
import math
import os
import pathlib
import re

from jasr import checkpoint
from jasr.averaging.mean import AverageError, normalised
from jasr.checkpoint.files import MANIFEST, read_manifest, version

PROVENANCE = "jasr_average.json"
_SMALLEST = 1e-4  # metrics below it weigh the same: 1 / 0 would take all


@dataclasses.dataclass(frozen=True)
class Member:
    """A checkpoint that may take part: its directory, step number and metrics."""

    path: pathlib.Path
    step: int
    metrics: dict


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


def _ranked(members, metric, mode):
    """The members that have the metric, best first; a tie goes to the newer."""
    sign = -1 if mode == "max" else 1
    having = [m for m in members if not math.isnan(m.metrics.get(metric, math.nan))]
    return sorted(having, key=lambda m: (sign * m.metrics[metric], -m.step))


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
    ranked = _ranked(members, metric, mode)
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


def best_of(members, metric="val_wer", mode="min"):
    """The member with the best metric if all have it, else the newest one."""
    ranked = _ranked(members, metric, mode)
    return ranked[0] if len(ranked) == len(members) else max(members, key=lambda m: m.step)


def check_once(members):
    """Raises AverageError if a file or directory, or a copy of it, is there twice."""
    for m, other in itertools.combinations(members, 2):
        if os.path.samefile(m.path, other.path) or _same_content(m.path, other.path):
            raise AverageError(f"{other.path} is the same checkpoint as {m.path}; leave one out")


def _same_content(one, other):
    """Whether two files or directories hold the same bytes; a step's manifest stands for all."""
    sizes = []
    for path in (one, other):
        inside = path.rglob(MANIFEST if (path / MANIFEST).exists() else "*")
        files = [path] if path.is_file() else [p for p in inside if p.is_file()]
        sizes.append(sorted((p.stat().st_size, str(p.relative_to(path))) for p in files))
    same = (filecmp.cmp(one / name, other / name, shallow=False) for _, name in sizes[0])
    return sizes[0] == sizes[1] and all(same)


def provenance(members, weights, how, **more):
    """What an average says of how it was made: JSON."""
    return {
        **more,
        "weights_from": how,
        "jasr": version(),
        "members": [
            {
                "step": m.step,
                "weight": w,
                "metrics": {k: v if math.isfinite(v) else None for k, v in m.metrics.items()},
                "path": str(m.path),
            }
            for m, w in zip(members, weights, strict=True)
        ],
    }
