"""Averages of steps of jasr's own, as a step."""

import pathlib

import jax
import numpy as np

from jasr import checkpoint, tree
from jasr.averaging.mean import AverageError, means, normalised
from jasr.averaging.members import PROVENANCE, Member, check_once, member, provenance
from jasr.checkpoint import read
from jasr.checkpoint.files import read_manifest
from jasr.systems import catalogue, compatibility, source


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
    check_once(members)
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
    state = {name: _mean(members, weights, part) for name, part in parts.items()}
    newest = max(range(len(members)), key=lambda i: members[i].step)
    made = provenance(members, weights, how, item=item)
    for m, row in zip(members, made["members"], strict=True):
        row["manifest_sha256"] = read_manifest(m.path)["sha256"]
    meta = metas[newest] | {"average": made}
    step = members[newest].step
    checkpoint.save_step(output, state, meta, step=step, beside={PROVENANCE: made})
    return made


def _mean(members, weights, item):
    """The average of one item of the members, as jax.Arrays on the CPU."""
    places = [m.path / item for m in members]
    found = means([read.arrays(p) for p in places], weights, list(map(str, places)))
    cpu = jax.devices("cpu")[0]
    for path, mean in found.items():
        if mean.dtype != np.float64:  # Orbax copies numpy arrays, but not JAX's
            found[path] = jax.block_until_ready(jax.device_put(mean, cpu))
    return tree.unflatten(found)


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
