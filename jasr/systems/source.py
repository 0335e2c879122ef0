"""Weights by path: a run, one step, an average, or a checkpoint of an original system."""

import hashlib
import os
import pathlib
import shutil

import jax

from jasr import checkpoint, sharding, tree
from jasr.checkpoint.files import delete, read_manifest, seal
from jasr.systems import originals

KEPT = "frozen_from"  # beside a run's checkpoints: the frozen weights that it was given


def resolve(path, item=""):
    """{"path", "item", "sha256"} that names the same weights later and elsewhere on this machine.

    A run becomes its newest good step, a directory of the original its weights file, a relative
    path an absolute one, and an item that was left open ("") the one that is read: a run that
    trains on does not change what was taken from it.
    """
    if original := originals.find(path):
        path, item = os.path.abspath(original.weights_file(path)), "params"
    else:
        path = str(checkpoint.find_step(path, items=()))
        if not item:
            item = "ema" if "ema" in checkpoint.items(path) else "params"
    return {"path": path, "item": item, "sha256": _checksum(path)}


def _checksum(path):
    """SHA-256 of a file, or of a step's manifest, which holds those of its files."""
    if os.path.isdir(path):
        return read_manifest(pathlib.Path(path))["sha256"]
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise checkpoint.CheckpointError(f"{path} cannot be read: {e.strerror}") from e


def load_meta(source, tokens=True):
    """{"config", "tokenizer"} that the weights were trained with.

    Args:
      source: what `resolve` made.
      tokens: False: the tokenizer is not asked for, and an original's vocabulary may be missing.
    """
    if original := originals.find(source["path"]):
        return original.load_meta(source["path"], tokens)
    return checkpoint.load_meta(source["path"])


def read(source):
    """(params, batch_stats) as numpy trees of what `resolve` named, with frozen parameters.

    Raises:
      checkpoint.CheckpointError: the weights are not there any more, are others, or are damaged.
    """
    path, item = source["path"], source["item"]
    if _checksum(path) != source["sha256"]:
        raise checkpoint.CheckpointError(
            f"{path} does not hold the weights that were taken from it (its checksum changed)"
        )
    if original := originals.find(path):
        _, variables = original.load(path)
        return variables["params"], variables["batch_stats"]
    path = checkpoint.find_step(path, items=("params", "ema", "batch_stats", "frozen"))
    params = checkpoint.load_params(path, item=item, verify=False)
    stats = checkpoint.load_params(path, item="batch_stats", verify=False)
    origin = checkpoint.load_meta(path).get("frozen_from")
    if origin:
        origin = locate(origin, path, path.parent, path.parent.parent)
        try:
            whole = tree.flatten(read(origin)[0])
        except checkpoint.CheckpointError as e:
            raise checkpoint.CheckpointError(
                f"{path} holds trained parameters only; its frozen ones came from "
                f"{origin['path']}, which cannot be read: {e}"
            ) from e
        params = tree.unflatten(whole | tree.flatten(params))
    elif "frozen" in checkpoint.items(path):
        params = tree.merge(params, checkpoint.load_params(path, item="frozen", verify=False))
    return params, stats


def keep(source, workdir):
    """`source` as a copy in the run directory `workdir`, which its own run cannot delete.

    A run lets old steps go; the frozen weights of another run must not go with them, nor those
    that the other run was given by a third, which are kept inside the copy. The copy is made of
    hard links where the file system can. An original's file is not copied.
    """
    if originals.find(source["path"]):
        return source
    directory = pathlib.Path(workdir).absolute() / KEPT
    if jax.process_index() == 0:
        _copy(source, directory)
    sharding.meet()
    return resolve(directory, source["item"])


def _copy(source, directory):
    wanted = (source["item"], "batch_stats", "frozen")
    step = checkpoint.find_step(source["path"], items=wanted)
    names = [name for name in checkpoint.items(step) if name in wanted]
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name in (*names, "meta"):
        shutil.copytree(step / name, temporary / name, copy_function=_link)
    origin = checkpoint.load_meta(step).get("frozen_from")
    if origin and not originals.find(origin["path"]):  # as it is: its checksum names it
        origin = locate(origin, step, step.parent, step.parent.parent)
        if not _holds(origin["path"], origin["sha256"]):
            raise checkpoint.CheckpointError(
                f"{step} holds trained parameters only; its frozen ones, {origin['path']}, are "
                "not there or are others"
            )
        shutil.copytree(origin["path"], temporary / KEPT, copy_function=_link)
    seal(temporary, step=read_manifest(step)["step"], items=names)
    delete(directory)
    temporary.rename(directory)


def _link(old, new):
    try:
        os.link(old, new)
    except OSError:  # another file system, or one without links
        shutil.copy(old, new)


def locate(source, *near):
    """`source`, or what `keep` made of it in one of the directories `near`: where its checksum
    is right, else where something is."""
    places = [pathlib.Path(source["path"]), *(pathlib.Path(d) / KEPT for d in near)]
    there = [p for p in places if p.exists()] or places[:1]
    right = (p for p in there if len(there) > 1 and _holds(p, source["sha256"]))
    return source | {"path": str(next(right, there[0]))}


def _holds(path, sha256):
    try:
        return _checksum(path) == sha256
    except checkpoint.CheckpointError:
        return False
