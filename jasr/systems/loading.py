"""Tasks by name, and a task with its weights from a checkpoint.

A task is a frozen dataclass without base class: `build(config, tokenizer)`, `init`, `loss`,
`predict`, `check`, `sharding`, `seconds_per_frame`.
"""

import importlib
import pathlib

TASKS = {
    "ctc": ("jasr.systems.lact.task", "CtcTask"),
    "parakeet": ("jasr.systems.fastconformer.task", "ParakeetTask"),
}


def sections(name):
    """Names of the config sections that the task `name` has of its own."""
    own = "front_end spec_augment wave_augment model loss".split()
    return [*own, "decoding"] if name == "parakeet" else own


def build(config, tokenizer, ways=1):
    """The task that config["task"] names.

    ways: parts that the rows of a batch are split into, on as many devices.

    Raises:
      ValueError: an unknown task.
    """
    name = config["task"]
    if name not in TASKS:
        raise ValueError(f"config.task {name!r} is not known; choose from {sorted(TASKS)}")
    module, cls = TASKS[name]
    return getattr(importlib.import_module(module), cls).build(config, tokenizer, ways)


def load(path, step=None, item="", model=None, options=None, like=""):
    """A task, its variables and the checkpoint's meta.

    Args:
      path: a run directory, a checkpoint step, an average, or a model of an original system
        (`interop.originals`).
      step: the step of a run; None = the newest good one.
      item: "params" or "ema"; "" = the moving average if the checkpoint has one.
      model: mapping of model settings to change, e.g. {"lact_updates": "off"}.
      options: how to decode, e.g. {"beam": 4}; see `ParakeetTask.with_options`.
      like: the .nemo whose config and tokenizer weights alone (.ckpt) belong to.

    Returns:
      (task, {"params", "batch_stats"} of numpy arrays, meta dict).

    Raises:
      checkpoint.CheckpointError: nothing good is there, or it does not say what model it is.
      ValueError: options that the model does not have.
    """
    from jasr import checkpoint, text
    from jasr.systems import originals, source

    if original := originals.find(path, like):
        if step is not None or item:
            raise ValueError(f"{path} has neither steps nor items; leave out --step and --item")
        meta, variables = original.load(path)
    else:
        # One step for all parts: each load by itself could fall back to another one.
        path = checkpoint.find_step(path, step, items=("params", "ema", "batch_stats", "frozen"))
        meta = checkpoint.load_meta(path)
        for key in ("config", "tokenizer"):
            if key not in meta:
                raise checkpoint.CheckpointError(
                    f"{path} has no {key!r} beside its weights, so no model can be built: it was "
                    "not saved by experiments.train. jasr.load_params reads its weights."
                )
        params, stats = source.read(source.resolve(path, item))
        variables = {"params": params, "batch_stats": stats}
    config = dict(meta["config"])
    if model:
        config["model"] = {**config["model"], **model}
    task = build(config, text.from_dict(meta["tokenizer"]))
    if options := {name: value for name, value in (options or {}).items() if value}:
        if not hasattr(task, "with_options"):
            raise ValueError(
                f"{', '.join(options)}: options of NeMo's models; {path} is of task "
                f"{config['task']!r}"
            )
        task, variables = task.with_options(variables, **options)
    return task, variables, meta


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
    checkpoint.save_step(checkpoints / "0", items, {**meta, "step": 0})
