"""A task of a config, and a task with its weights from a checkpoint."""

import pathlib

from jasr.systems import catalogue


def build(config, tokenizer, ways=1):
    """The seam.Task of a run's config.

    ways: parts that the rows of a batch are split into, on as many devices.

    Raises:
      ValueError: an unknown task, or settings that contradict each other.
    """
    system = catalogue.get(config["task"])
    return catalogue.resolve(system.task)(config, tokenizer, ways)


def verb(task, name):
    """The WindowDecoder or Stepper by which a task does what `name` says: "transcribe" ...

    Raises:
      ValueError: it does not; the error names what it does.
    """
    if name not in task.verbs:
        known = ", ".join(task.verbs) or "nothing"
        raise ValueError(f"this model does not {name}; what it does: {known}")
    return task.verbs[name]


def load(path, step=None, item="", model=None, options=None, like=""):
    """A task, its variables and the checkpoint's meta.

    Args:
      path: a run directory, a checkpoint step, an average, or a model of an original system.
      step: the step of a run; None = the newest good one.
      item: "params" or "ema"; "" = the moving average if the checkpoint has one.
      model: mapping of model settings to change, e.g. {"lact_updates": "off"}.
      options: {name: value} of the options that the system has for transcribing, {"beam": 4}.
      like: the .nemo whose config and tokenizer weights alone (.ckpt) belong to.

    Returns:
      (task, {"params", "batch_stats"} of numpy arrays, meta dict).

    Raises:
      checkpoint.CheckpointError: nothing good is there, or it does not say what model it is.
      ValueError: options that the model does not have.
    """
    from jasr import text
    from jasr.systems import source

    meta, leaves = source.opened(path, step, item, like)
    check_meta(path, meta)
    params, stats = source.in_memory(leaves)
    variables = {"params": params, "batch_stats": stats}
    config = dict(meta["config"])
    if model:
        config["model"] = {**config["model"], **model}
    config = catalogue.with_options(config, options or {})
    return build(config, text.from_dict(meta["tokenizer"])), variables, meta


def check_meta(path, meta):
    """Raises checkpoint.CheckpointError unless a checkpoint's meta says what model it is."""
    from jasr import checkpoint

    for key in ("config", "tokenizer"):
        if key not in meta:
            raise checkpoint.CheckpointError(
                f"{path} has no {key!r} beside its weights, so no model can be built: it was "
                "not saved by experiments.train. jasr.load_params reads its weights."
            )


def save(path, meta, variables):
    """A run directory at `path` that holds one step, 0: variables with their meta, as `load` gives
    them. Training starts from it through config.init.path.

    Raises:
      checkpoint.CheckpointError: there are checkpoints already.
    """
    from jasr import checkpoint

    checkpoints = pathlib.Path(path) / "checkpoints"
    if checkpoints.exists() and any(checkpoints.iterdir()):
        raise checkpoint.CheckpointError(f"{checkpoints} holds a run already; name another place")
    items = {name: tree for name, tree in variables.items() if tree}
    whole = {key: value for key, value in meta.items() if key != "frozen_from"}
    checkpoint.save_step(checkpoints / "0", items, {**whole, "step": 0})
