"""Weights by path: a run, one step, an average, or a checkpoint of an original system."""

import os

from jasr import checkpoint, tree


def resolve(path, item=""):
    """{"path", "item"} that names the same weights later and elsewhere on this machine.

    A run becomes its newest good step, a relative path an absolute one, and an item that was left
    open ("") the one that is read: a run that trains on does not change what was taken from it.
    """
    from jasr.interop import lact

    if lact.is_lact(path):
        return {"path": os.path.abspath(path), "item": "params"}
    step = checkpoint.find_step(path, items=())
    if not item:
        item = "ema" if "ema" in checkpoint.items(step) else "params"
    return {"path": str(step), "item": item}


def read(source):
    """(params, batch_stats) as numpy trees of what `resolve` named, with frozen parameters.

    Raises:
      checkpoint.CheckpointError: the weights are not there any more, or are damaged.
    """
    from jasr.interop import lact

    path, item = source["path"], source["item"]
    if lact.is_lact(path):
        _, variables = lact.read_weights(path)
        return variables["params"], variables["batch_stats"]
    path = checkpoint.find_step(path, items=("params", "ema", "batch_stats", "frozen"))
    params = checkpoint.load_params(path, item=item, verify=False)
    stats = checkpoint.load_params(path, item="batch_stats", verify=False)
    origin = checkpoint.load_meta(path).get("frozen_from")
    if origin:
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
