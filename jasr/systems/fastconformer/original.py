"""NeMo's files and Hugging Face's Parakeet directories as originals (`seam.Original`)."""

import base64
import dataclasses
import functools
import os
import pathlib
import warnings

import numpy as np

from jasr import settings, text, tree
from jasr.interop import lazy, sections
from jasr.seam import Original
from jasr.systems.fastconformer import hf_parakeet, nemo, nemo_config
from jasr.systems.fastconformer.model import JointSettings, PredictionSettings
from jasr.systems.fastconformer.nemo_config import BEAM, DECODING
from jasr.systems.fastconformer.task import build

WEIGHTS = "model.safetensors"


# ---- their files ---------------------------------------------------------------------------------


def _nemo_files(path, like=""):
    """A .nemo or .ckpt; any file of weights whose config is that of `like`."""
    path = pathlib.Path(path)
    if like and (path.is_dir() or path.suffix == ".nemo"):
        raise nemo.NemoError(f"{path} has its own config; --like is for a .ckpt or .pt alone")
    return (path,) if like or nemo.is_nemo(path) else ()


def _hf_files(path, like=""):
    """The weights of a Parakeet directory."""
    directory = _directory(path)
    return hf_parakeet.weights_files(directory) if hf_parakeet.is_parakeet(directory) else ()


def _directory(path):
    """A Parakeet's directory, where `path` may be the weights' file in it."""
    path = pathlib.Path(path)
    return path.parent if path.name == WEIGHTS else path


def _read(path, like=""):
    """The NemoModel at a path, its weights mapped; the last one is kept for who asks again."""
    files = _hf_files(path) or (path, *([like] if like else []))
    with nemo.errors(os.fspath(path)):
        stamp = tuple((os.fspath(f), os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files)
    return _mapped(os.fspath(_directory(path)), os.fspath(like), stamp)


@functools.lru_cache(1)
def _mapped(path, like, stamp):
    if os.path.isdir(path):
        return hf_parakeet.mapped(path)
    return nemo.mapped(path, like=like or None)


def _meta(path, like="", tokens=True):
    return meta_of(_read(path, like), path, tokens)


def _leaves(path, like=""):
    return tree.flatten(_read(path, like).variables)


def _write(write):
    """How an export is written by `write(path, NemoModel)`."""

    def exports(path, meta, leaves, options):
        model, changes = exported(model_of(meta, leaves), **options)
        write(path, model)
        return [model.kind, *changes]

    return exports


NEMO = Original("nemo", (".nemo",), _nemo_files, _meta, _leaves, _write(nemo.write))
HF = Original("hf", ("_hf", "-hf"), _hf_files, _meta, _leaves, _write(hf_parakeet.write))


# ---- a NemoModel and a run's meta ----------------------------------------------------------------


def meta_of(model, path, tokens=True):
    """{"config", "tokenizer", "task", "step", "nemo"} of a NemoModel, as in a step of ours; "nemo"
    is what else its file says, which is written back.

    Raises:
      nemo.NemoError: no tokenizer, unless `tokens` is False, or no recogniser of its own.
    """
    buffers = {key: _kept(array) for key, array in model.buffers.items()}
    kept = {"config": model.nemo_config, "buffers": buffers}
    meta = {"config": run_config(model), "step": 0, "task": "fastconformer", "nemo": kept}
    if tokens:
        if model.tokenizer is None:
            raise nemo.NemoError(
                f"{path} has no tokenizer, which its texts need; name a .nemo that has it: "
                f"{nemo.LIKE}"
            )
        meta["tokenizer"] = model.tokenizer
    return meta


def run_config(model):
    """A run's config ({"task", "model", "front_end", "loss", "decoding"}) of a NemoModel.

    Raises:
      nemo.NemoError: a kind that is not a recogniser of its own (Canary's encoder).
    """
    given = model.config
    if model.kind == "encoder":
        raise nemo.NemoError("only the encoder of this model is known, and it gives no text alone")
    parts = {"encoder": dict(given["encoder"])}
    for name, cls in (("decoder", PredictionSettings), ("joint", JointSettings)):
        if name in given:  # sizes that follow from tokenizer and encoder are left out
            fields = {f.name for f in dataclasses.fields(cls)}
            parts[name] = {k: v for k, v in given[name].items() if k in fields}
    return {
        "task": "fastconformer",
        "model": {"kind": model.kind, **parts},
        "front_end": dict(given["front_end"]),
        "loss": dict(given["loss"]),
        "decoding": _decoding(model),
    }


def _decoding(model):
    """The run's config.decoding of a NemoModel; a warning says what is done in another way."""
    how = dict(model.config.get("decoding", {}))
    theirs = model.nemo_config.get("model", model.nemo_config).get("decoding") or {}
    strategy, known = how.get("strategy") or theirs.get("strategy") or "greedy", nemo_config.GREEDY
    if model.kind == "ctc" and strategy not in known:
        _note(f"decoding.strategy {strategy!r} of a CTC model: decoded greedily here")
        how.pop("strategy", None)
    elif strategy in nemo_config.BEAMS:
        how["strategy"] = "beam"
        if strategy not in ("maes", "beam"):
            _note(f"decoding.strategy {strategy!r}: decoded by a beam search like 'maes' here")
    elif strategy not in known:
        _note(f"decoding.strategy {strategy!r} is not known: decoded greedily here")
        how = {"max_symbols": how.get("max_symbols", 10)}
    for name in ("greedy", "beam"):
        part = theirs.get(name) or {}
        if part.get("ngram_lm_model") or (part.get("boosting_tree") or {}).get("model_path"):
            _note(f"decoding.{name} of the file has a language model or phrases: not used here")
    if how.get("max_symbols", 10) is None:
        how["max_symbols"] = 0
    return how


def _note(text):
    warnings.warn(f"NeMo's {text}", stacklevel=4)


def model_of(meta, leaves):
    """The NemoModel of a run's meta and its leaves {path: array-like}, with what `meta` keeps of
    the file that it was read from."""
    task = build(meta["config"], text.from_dict(meta["tokenizer"]), 1)
    c = task.config
    loss, how = settings.to_dict(task.loss_config), settings.to_dict(task.decoding)
    config = {
        "front_end": settings.to_dict(task.front_end),
        "encoder": settings.to_dict(c.encoder),
        "loss": {name: loss[name] for name in nemo_config.loss_fields(c.kind, loss["kind"])},
    }
    if c.is_transducer:
        config["decoder"] = settings.to_dict(c.prediction_config)
        config["joint"] = settings.to_dict(c.joint_config)
        rows = (*DECODING.rows, *(BEAM.rows if how["strategy"] == "beam" else ()))
        config["decoding"] = {row.field: how[row.field] for row in rows}
        config["decoding"]["max_symbols"] = how["max_symbols"] or None
    kept = meta.get("nemo", {})
    variables = tree.unflatten({p: lazy.cast(x, np.float32) for p, x in leaves.items()})
    variables = {"params": {}, "batch_stats": {}, **variables}
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
    if branch == "transducer" and model.kind == "ctc":
        raise nemo.NemoError("a model of kind 'ctc' has no branch 'transducer'")
    if branch:
        model = nemo.branch(model, "ctc" if branch == "ctc" else model.config["loss"]["kind"])
    if modern_front_end:
        new = {"front_end": {"kind": "nemo"}, "encoder": {"masked_subsampling": True}}
        for section, values in new.items():
            for key, value in values.items():
                if (old := model.config[section][key]) != value:
                    changes.append(f"{section}.{key} {old!r} -> {value!r}")
        model = dataclasses.replace(model, config=sections.merge(model.config, new))
        ends = "the frames at an utterance's ends are not those of its training"
        changes.append(
            ends if changes else "front end and subsampling are those of NeMo 2.5 already"
        )
    return model, changes


def _array(kept):
    data = np.frombuffer(base64.b64decode(kept["data"]), np.dtype(kept["dtype"]))
    return data.reshape(kept["shape"])


def _kept(array):
    """A small array as JSON keeps it."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}
