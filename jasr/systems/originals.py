"""Models of original systems by path: which system a file or directory is of, and how it is read.

An `Original` answers what a run of jasr's own would: its weights file, its config and tokenizer as
a checkpoint's meta has them, its variables.
"""

import base64
import dataclasses
import os
import pathlib
import typing
import warnings

import numpy as np

from jasr import settings
from jasr.systems.fastconformer import hf_parakeet, nemo, nemo_config
from jasr.systems.fastconformer.model import JointSettings, PredictionSettings
from jasr.systems.lact import original


class Original(typing.NamedTuple):
    """How a system's files are read; every function takes their path.

    weights_file: the file that holds the weights.
    load_meta: (path, tokens) -> {"config", "tokenizer", "step"}; with tokens=False the tokenizer
      may be missing.
    load: (meta, {"params", "batch_stats"} of numpy arrays).
    """

    weights_file: typing.Callable
    load_meta: typing.Callable
    load: typing.Callable


def find(path, like=None):
    """The Original at `path`, or None where it is none of these: a NeMo archive or checkpoint
    (.nemo, .ckpt), a Hugging Face Parakeet directory, original LaCT ASR (.pt or directory).

    like: path of the .nemo whose config and tokenizer a file of weights (.ckpt, .pt) belongs to.

    Raises:
      nemo.NemoError: `like` is given for something else.
    """
    if like:
        if os.path.isdir(path) or os.fspath(path).endswith(".nemo"):
            raise nemo.NemoError(f"{path} has its own config; --like is for a .ckpt or .pt alone")
        return _nemo(like)
    if nemo.is_nemo(path) or hf_parakeet.is_parakeet(_directory(path)):
        return _nemo()
    if original.is_lact(path):
        return Original(original.weights_file, original.load_meta, _load_lact)
    return None


def read_parakeet(path, like=None):
    """The NemoModel of a .nemo, a .ckpt with its config (or that of `like`), or a Hugging Face
    Parakeet directory."""
    if os.path.isdir(path):
        return hf_parakeet.read(path)
    return nemo.read(path, like=like)


def run_config(model):
    """A run's config ({"task", "model", "front_end", "loss", "decoding"}) of a NemoModel.

    Raises:
      nemo.NemoError: a kind that is not a recogniser of its own (Canary's encoder).
    """
    sections = model.config
    if model.kind == "encoder":
        raise nemo.NemoError("only the encoder of this model is known, and it gives no text alone")
    parts = {"encoder": dict(sections["encoder"])}
    for name, cls in (("decoder", PredictionSettings), ("joint", JointSettings)):
        if name in sections:  # sizes that follow from tokenizer and encoder are left out
            fields = {f.name for f in dataclasses.fields(cls)}
            parts[name] = {k: v for k, v in sections[name].items() if k in fields}
    loss = dict(sections["loss"])
    return {
        "task": "fastconformer",
        "model": {"kind": model.kind, **parts},
        "front_end": dict(sections["front_end"]),
        "loss": loss,
        "decoding": _decoding(model),
    }


def _decoding(model):
    """The run's config.decoding of a NemoModel; a warning says what is done in another way."""
    how = dict(model.config.get("decoding", {}))
    theirs = model.nemo_config.get("model", model.nemo_config).get("decoding") or {}
    strategy = how.get("strategy") or theirs.get("strategy") or "greedy"
    if model.kind == "ctc" and strategy not in nemo_config.GREEDY:
        _note(f"decoding.strategy {strategy!r} of a CTC model: decoded greedily here")
        how.pop("strategy", None)
    elif strategy in nemo_config.BEAMS:
        how["strategy"] = "beam"
        if strategy not in ("maes", "beam"):
            _note(f"decoding.strategy {strategy!r}: decoded by a beam search like 'maes' here")
    elif strategy not in nemo_config.GREEDY:
        _note(f"decoding.strategy {strategy!r} is not known: decoded greedily here")
        how = {"max_symbols": how.get("max_symbols", 10)}
    for name in ("greedy", "beam"):
        part = theirs.get(name) or {}
        helpers = [part.get("ngram_lm_model"), (part.get("boosting_tree") or {}).get("model_path")]
        if any(helpers):
            _note(f"decoding.{name} of the file has a language model or phrases: not used here")
    if how.get("max_symbols", 10) is None:
        how["max_symbols"] = 0
    return how


def _note(text):
    warnings.warn(f"NeMo's {text}", stacklevel=4)


def nemo_model(task, variables, meta):
    """The NemoModel of a ParakeetTask, with what `meta` keeps of the file it was read from.

    Raises:
      nemo.NemoError: the task is of another kind of model.
    """
    if not hasattr(task.config, "joint"):
        raise nemo.NemoError(f"{type(task).__name__} is no model of NeMo's")
    c = task.config
    loss = {k: v for k, v in settings.to_dict(task.loss_config).items() if k != "ramp_steps"}
    unread = ["durations", "sigma", "omega"] if loss["kind"] != "tdt" else []
    unread += ["fastemit_lambda", "clamp"] if loss["kind"] == "ctc" else []
    unread += ["ctc_weight", "ctc_reduction"] if c.kind != "hybrid" else []
    config = {
        "front_end": settings.to_dict(task.front_end),
        "encoder": settings.to_dict(c.encoder),
        "loss": {k: v for k, v in loss.items() if k not in unread},
    }
    if c.is_transducer:
        config["decoder"] = settings.to_dict(c.prediction_config)
        config["joint"] = settings.to_dict(c.joint_config)
        config["decoding"] = {
            "strategy": task.decoding.strategy,
            "max_symbols": task.decoding.max_symbols or None,
        }
        if task.decoding.strategy == "beam":
            names = ("beam", "expansion_gamma", "length_normalised")
            config["decoding"] |= {name: getattr(task.decoding, name) for name in names}
    kept = meta.get("nemo", {})
    return nemo.NemoModel(
        kind=c.kind,
        config=config,
        tokenizer=task.tokenizer.to_dict(),
        variables=variables,
        nemo_config=kept.get("config", {}),
        buffers={k: _array(v) for k, v in kept.get("buffers", {}).items()},
    )


def exported(model, branch="", modern_front_end=False):
    """(NemoModel to be written, sentences that say what was changed).

    Args:
      branch: of a hybrid: "transducer" or "ctc".
      modern_front_end: a model of a NeMo before 2.5 takes the front end and subsampling of 2.5 and
        later, the only ones that transformers has.

    Raises:
      nemo.NemoError: no such branch.
    """
    changes = []
    if branch:
        if branch == "transducer" and model.kind == "ctc":
            raise nemo.NemoError("a model of kind 'ctc' has no branch 'transducer'")
        model = nemo.branch(model, "ctc" if branch == "ctc" else model.config["loss"]["kind"])
    if modern_front_end:
        config = dict(model.config)
        for section, key, value in (
            ("front_end", "kind", "nemo"),
            ("encoder", "masked_subsampling", True),
        ):
            if (old := config[section][key]) != value:
                changes.append(f"{section}.{key} {old!r} -> {value!r}")
                config[section] = {**config[section], key: value}
        model = dataclasses.replace(model, config=config)
        if changes:
            changes.append("the frames at an utterance's ends are not those of its training")
        else:
            changes.append("front end and subsampling are those of NeMo 2.5 already")
    return model, changes


def _array(kept):
    data = np.frombuffer(base64.b64decode(kept["data"]), np.dtype(kept["dtype"]))
    return data.reshape(kept["shape"])


def _kept(array):
    """A small array as JSON keeps it."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def _load_lact(path):
    return original.load_meta(path), original.read_weights(path)[1]


def _meta(model, path, tokens=True):
    buffers = {key: _kept(array) for key, array in model.buffers.items()}
    meta = {"config": run_config(model), "step": 0, "task": "fastconformer"}
    meta["nemo"] = {"config": model.nemo_config, "buffers": buffers}
    if tokens:
        if model.tokenizer is None:
            raise nemo.NemoError(
                f"{path} has no tokenizer, which its texts need; name a .nemo that has it: "
                f"{nemo.LIKE}"
            )
        meta["tokenizer"] = model.tokenizer
    return meta


def _load_nemo(path, like=None):
    model = read_parakeet(path, like)
    return _meta(model, path), model.variables


def _nemo_weights(path):
    path = pathlib.Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def _nemo(like=None):
    return Original(
        weights_file=_nemo_weights,
        load_meta=lambda path, tokens=True: _meta(
            read_parakeet(_directory(path), like), path, tokens
        ),
        load=lambda path: _load_nemo(_directory(path), like),
    )


def _directory(path):
    """A Parakeet's directory, where `path` is the weights file in it."""
    path = pathlib.Path(path)
    return path.parent if path.name == "model.safetensors" else path
