"""Parameter trees by path: naming, matching rules, splitting, merging, comparing.

A tree is a plain nested dict; a leaf's name is its path, "model/layers_0/attn/qkv/kernel". One
regex grammar over these names does sharding, freezing, learning-rate multipliers, weight decay
and partial restore: full match, first match wins, and it is strict in both directions.
"""

import math
import re


class TreeError(ValueError):
    """Two trees, or a tree and a set of rules, do not fit."""


def flatten(tree, prefix=""):
    """`{path: leaf}` of a nested dict, in insertion order; an empty dict has no leaves."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, path + "/"))
        else:
            flat[path] = value
    return flat


def unflatten(flat):
    """The nested dict of `{path: leaf}`.

    Raises:
      TreeError: a path is both a leaf and a branch.
    """
    tree = {}
    for path, value in flat.items():
        *branches, leaf = path.split("/")
        node = tree
        for name in branches:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise TreeError(f"{path!r} runs through a leaf at {name!r}")
        if leaf in node:
            raise TreeError(f"{path!r} is given twice, or is a branch too")
        node[leaf] = value
    return tree


def match(rules, paths, *, what="rule", optional=False):
    """`{path: value}` of the first rule whose regex matches the whole path.

    Args:
      rules: sequence of (regex, value).
      paths: iterable of path names.
      what: the word for these rules in errors, e.g. "sharding rule".
      optional: if True a path without a rule is left out of the result; otherwise it raises.

    Raises:
      TreeError: a path that no rule matches, or a rule that matches no path at all.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    result, uncovered, used = {}, [], set()
    for path in paths:
        fits = [i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(path)]
        used.update(fits)
        if fits:
            result[path] = compiled[fits[0]][1]
        elif not optional:
            uncovered.append(path)
    problems = []
    if uncovered:
        problems.append(f"no {what} matches " + ", ".join(uncovered))
    dead = [pattern.pattern for i, (pattern, _) in enumerate(compiled) if i not in used]
    if dead:
        problems.append(f"{what}s that match nothing: " + ", ".join(map(repr, dead)))
    if problems:
        raise TreeError("; ".join(problems))
    return result


def split(tree, chosen):
    """(the leaves whose path is in `chosen`, the others), as two trees."""
    sides = ({}, {})
    for path, leaf in flatten(tree).items():
        sides[path not in chosen][path] = leaf
    return tuple(map(unflatten, sides))


def merge(*trees):
    """One tree of the leaves of several disjoint ones."""
    flat = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise TreeError(f"{path!r} is in two of the merged trees")
            flat[path] = leaf
    return unflatten(flat)


def differences(want, got, *, dtype=False):
    """Lines that say how tree `got` differs from `want` in names, shapes and (on request) dtypes.

    A line starts with "-" for a leaf that is missing from `got`, "+" for one that is only in
    `got`, "~" for one whose shape or dtype differs. Leaves need `.shape` and `.dtype` only.
    """
    want, got = flatten(want), flatten(got)
    lines = [f"- {p} {tuple(want[p].shape)}" for p in want if p not in got]
    lines += [f"+ {p} {tuple(got[p].shape)}" for p in got if p not in want]
    for p in (p for p in want if p in got):
        if tuple(want[p].shape) != tuple(got[p].shape):
            lines.append(f"~ {p} is {tuple(got[p].shape)}, wanted {tuple(want[p].shape)}")
        elif dtype and want[p].dtype != got[p].dtype:
            lines.append(f"~ {p} is {got[p].dtype}, wanted {want[p].dtype}")
    return lines


def compare(want, got, *, dtype=False, what="tree"):
    """Nothing, if the two trees agree in names and shapes (and dtypes on request).

    Raises:
      TreeError: lists every leaf that is missing (-), unexpected (+) or different (~).
    """
    lines = differences(want, got, dtype=dtype)
    if lines:
        shown = "\n  ".join(lines[:200])
        more = f"\n  ... and {len(lines) - 200} more" if len(lines) > 200 else ""
        raise TreeError(f"{what} does not fit ({len(lines)} differences):\n  {shown}{more}")


def count(tree):
    """The number of elements in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())
