"""Writes one step directory with Orbax: the trees, `meta`, `metrics`, and the seal before the
rename."""

import contextlib
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from jasr.checkpoint.files import (
    CheckpointError,
    delete,
    first_line,
    seal,
    set_apart,
    sync_directory,
    write_json,
    write_text,
)
from jasr.checkpoint.read import is_key


def save_step(directory, state, meta=None, metrics=None, *, step=0, beside=None):
    """Writes one step directory outside a run's series (an average, an import), sealed.

    It is whole under its name or not there; what was there before is replaced.

    Args:
      directory: its path; state, meta, metrics: as in `Checkpoints.save`.
      step: the number that its manifest names.
      beside: {file name: JSON-able value} put into the directory.
    """
    directory = pathlib.Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    meta, apart = set_apart(meta)
    names, args = arguments(state, meta, metrics, copy=False)

    def before_rename():
        (temporary,) = temporaries(directory)
        for name, value in (beside or {}).items():
            write_json(temporary / name, value)
        for name, text in apart.items():
            write_text(temporary / name, text)
        seal(temporary, step=step, items=names)

    for old in temporaries(directory):
        shutil.rmtree(old)
    saver = saver_of(names, before_rename)
    try:
        delete(directory)
        saver.save(directory, args=args)
        saver.wait_until_finished()
        sync_directory(directory.parent)
    except Exception as e:
        for old in temporaries(directory):
            shutil.rmtree(old, ignore_errors=True)
        raise CheckpointError(f"{directory} could not be written: {first_line(e)}") from e
    finally:
        with contextlib.suppress(Exception):
            saver.close()


def arguments(state, meta, metrics, copy=True):
    """(item names, Orbax's arguments) of one save."""
    metrics = {k: float(v) for k, v in (metrics or {}).items()}
    json.dumps(meta)  # raises here, with a traceback that names the caller
    encode = functools.partial(_encode, copy=copy)
    encoded = {k: jax.tree.map(encode, v) for k, v in state.items() if jax.tree.leaves(v)}
    reserved = {"meta", "metrics"} & encoded.keys()
    if reserved:
        raise ValueError(f"state items may not be called {sorted(reserved)}")
    args = {k: ocp.args.PyTreeSave(v) for k, v in encoded.items()}
    args |= {"meta": ocp.args.JsonSave(meta or {}), "metrics": ocp.args.JsonSave(metrics)}
    return sorted(encoded), ocp.args.Composite(**args)


def temporaries(directory):
    """The directories that Orbax is writing, or has left, for the step directory `directory`."""
    start = directory.name + ".orbax-checkpoint-tmp"
    return [p for p in directory.parent.iterdir() if p.name.startswith(start)]


def saver_of(items, before_rename, barrier=None):
    """Orbax's asynchronous writer of these trees, of `meta` and of `metrics`.

    Not compressed: float weights shrink by 8 %, and are written 3x and read 4x slower. The file
    name of the metrics is the one that Orbax's CheckpointManager looks for.
    """
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in items:
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        registry.add(name, ocp.args.PyTreeSave, handler)
    registry.add("metrics", ocp.args.JsonSave, ocp.JsonCheckpointHandler("metrics"))
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(handler_registry=registry),
        async_options=ocp.options.AsyncOptions(
            post_finalization_callback=before_rename, barrier_sync_fn=barrier
        ),
    )


def about_storage(error):
    """Whether an exception is about disk space or permission, and not a mistake of the caller."""
    words = ("RESOURCE_EXHAUSTED", "No space", "PERMISSION_DENIED", "Read-only")
    return isinstance(error, OSError) or any(w in str(error) for w in words)


def _encode(x, copy=True):
    """What Orbax is given for one leaf: raw key data, and a copy of what could be changed."""
    if is_key(x):
        return jax.random.key_data(x)
    if isinstance(x, jax.Array):
        return x
    return np.array(x) if copy else np.asarray(x)
