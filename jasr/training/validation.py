"""Measurements of named data sets while a model trains, on any mesh."""

import dataclasses
import os
import re

import jax
import numpy as np

from jasr import sharding, tree
from jasr.data import DataError


def sets_of(valid):
    """{name: sources} of config.data.valid.

    valid: sources, which are one set named "", or sources written as "name=path", those of equal
      names being one set.

    Raises:
      DataError: named and unnamed sources together.
    """
    found = {}
    if isinstance(valid, (str, os.PathLike)):
        valid = (valid,)
    for source in valid:
        name = ""
        if isinstance(source, str) and not os.path.exists(source):
            if match := re.fullmatch(r"([\w.-]+)=(.+)", source):
                name, source = match.groups()
        found.setdefault(name, []).append(source)
    if "" in found and len(found) > 1:
        raise DataError(f"config.data.valid: give every source a name or none: {tuple(valid)}")
    return {name: tuple(sources) for name, sources in found.items()}


def bounded(sources, layout, shapes, accumulate, ways):
    """DataConfig whose batches cost no more than a micro-batch of the training `shapes`.

    One item for each of the `ways` that a batch is split is the least, however long it is.
    """
    rows, sizes = np.asarray(shapes)[:, 0], np.asarray(shapes)[:, 1:]
    return dataclasses.replace(
        sources,
        batch_multiple=ways,
        batch_cost=float((rows * layout.cost(sizes)).max()) / accumulate,
        bucket_batch_size=(),
        bucket_duration_bins=(),
        num_buckets=len(shapes),
    )


def variables(state):
    """What is validated of a TrainState: the moving average if it keeps one."""
    params = tree.merge(state.ema or state.params, state.frozen)
    return {"params": params, "batch_stats": state.batch_stats}


def chosen(task, names):
    """{name: Validator} of config.train.validate; () = all that the task has.

    Raises:
      ValueError: a name that the task does not have.
    """
    known = task.validators
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"config.train.validate {unknown}: this model has {', '.join(known)}")
    return {name: known[name] for name in names or known}


def metric_names(validators, sets):
    """Names of all that a validation gives: "val_wer", and "val_wer/clean" of named sets."""
    names = [f"val_{metric}" for v in validators.values() for metric in v.metrics]
    return [*names, *(f"{name}/{s}" for name in names for s in sets if s)]


def program(validators):
    """(variables, batch, key) -> {validator: {name: [B, ...]}}, to be jitted: what two validators
    compute alike, XLA computes once."""

    def run(variables, batch, key):
        return {name: v.run(variables, batch, key) for name, v in validators.items()}

    return run


def rows_of(programs, data, mesh, variables, key, batches=0):
    """{validator: {index number: {name: row}}} of a set, on every process.

    Args:
      programs: `program` compiled for each bucket of the set, by number.
      data: what `data.open_eval` returns.
      key: what a row may draw from, with its index.
      batches: stop after so many batches; 0 = all.
    """
    found = {}
    stream = data.iterate(jax.process_index(), jax.process_count())
    for number, (bucket, batch) in enumerate(stream):
        if batches and number == batches:
            break
        batch = sharding.put_batch(batch, mesh)
        rows = {**programs[bucket](variables, batch, key), "index": batch["index"]}
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            rows = multihost_utils.process_allgather(rows, tiled=True)
        rows = jax.device_get(rows)
        index = rows.pop("index")
        for name, columns in rows.items():
            kept = found.setdefault(name, {})
            for row in np.flatnonzero(index >= 0):
                kept[int(index[row])] = {k: column[row] for k, column in columns.items()}
    return found


def validate(validators, programs, sets, mesh, variables, key, batches=0):
    """({metric: value}, sentences about the first set) of named sets.

    "val_wer" is the mean of the sets, "val_wer/clean" that of the set "clean".

    Args:
      validators: {name: Validator}; programs: {set: {bucket: compiled `program`}}.
      sets: {name: what `data.open_eval` returns}.
    """
    values, said = {}, []
    for number, (name, data) in enumerate(sets.items()):
        rows = rows_of(programs[name], data, mesh, variables, key, batches)
        for kind, validator in validators.items():
            mine = rows.get(kind, {})
            scores, lines = validator.score(mine, {i: data.item(i) for i in mine})
            said += lines if not number else []
            for metric, value in scores.items():
                values.setdefault(f"val_{metric}", {})[name] = value
    result = {metric: float(np.mean(list(of.values()))) for metric, of in values.items()}
    named = {f"{m}/{s}": v for m, of in values.items() for s, v in of.items() if s}
    return result | named, said
