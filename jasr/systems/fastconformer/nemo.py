"""NeMo's speech models (.nemo archives, Lightning checkpoints, bare state dicts): read as our
variables without running anything from them, and written so that NeMo restores them.

    model = nemo.read("parakeet-tdt_ctc-110m.nemo")
    model.kind, model.config["encoder"]["d_model"], model.variables["params"]["encoder"]
    nemo.write("copy.nemo", model)

Names are translated by `nemo_weights`, settings by `nemo_config`.
"""

import base64
import contextlib
import dataclasses
import os
import re
import tempfile
import uuid
import warnings

import jax
import numpy as np

from jasr import tree
from jasr.interop import lazy, nemo_archive, plain_yaml, table, torch_file
from jasr.systems.fastconformer import nemo_config, nemo_weights
from jasr.systems.fastconformer.nemo_weights import TRANSDUCERS, rows, shapes
from jasr.text import SentencePieceTokenizer, sentencepiece_model

LIKE = "--like=model.nemo of convert, transcribe, evaluate and expand_vocab (like=... in Python)"
BUFFERS = r"preprocessor\.featurizer\.(window|fb)|.*\.num_batches_tracked"


class NemoError(ValueError):
    """A file that is no model known here, or a model that NeMo does not have."""


@dataclasses.dataclass(frozen=True)
class NemoModel:
    """A model as data.

    kind, config: those of nemo_config.Settings.
    tokenizer: what `text.from_dict` takes; None where the file has none (checkpoints) or several.
    variables: {"params", "batch_stats"} of f32 array-likes (`interop.lazy`).
    nemo_config: the config as it stood in the file.
    buffers: {key: array} of the state dict's entries that are no variables, written back as they
      came: the front end's window and filters, counts of batches.
    """

    kind: str
    config: dict
    tokenizer: dict | None = dataclasses.field(repr=False)
    variables: dict = dataclasses.field(repr=False)
    nemo_config: dict = dataclasses.field(default_factory=dict, repr=False)
    buffers: dict = dataclasses.field(default_factory=dict, repr=False)


def is_nemo(path):
    """Whether `path` looks like one of NeMo's files, by its name."""
    return os.path.isfile(path) and os.fspath(path).endswith((".nemo", ".ckpt"))


def branch(model, kind):
    """The CTC ("ctc") or the transducer branch ("rnnt" or "tdt") of a hybrid, as its own model.

    Raises:
      NemoError: the model has no such branch.
    """
    if kind == model.kind:
        return model
    loss = dict(model.config["loss"])
    weight = {name: loss.pop(f"ctc_{name}", None) for name in ("weight", "reduction")}
    if model.kind != "hybrid" or kind not in ("ctc", loss["kind"]):
        raise NemoError(f"a model of kind {model.kind!r} has no branch {kind!r}")
    params, config = dict(model.variables["params"]), dict(model.config)
    head = params.pop("ctc_decoder")
    if kind == "ctc":
        params = {"encoder": params["encoder"], "decoder": head}
        config = {name: config[name] for name in ("front_end", "encoder")}
        loss = {"kind": "ctc", "reduction": weight["reduction"]}
    return dataclasses.replace(
        model,
        kind=kind,
        config={**config, "loss": loss},
        variables={**model.variables, "params": params},
    )


# ---- reading -------------------------------------------------------------------------------------


def read(path, *, like=None):
    """`mapped`, with every weight copied into memory, one by one."""
    return owned(mapped(path, like=like))


def mapped(path, *, like=None):
    """The NemoModel of a file: .nemo (tar or tar.gz), a Lightning .ckpt, or a bare state dict.

    Weights stay in the file until they are read. Of a gzip file that is a temporary one, which is
    gone by name already and whose room on the disk is free when the model is.

    like: path of a .nemo, or of a model's config or recipe (.yaml), whose config and tokenizer the
      weights belong to; for files that hold weights alone. A warning says where weights are of
      another precision.

    Raises:
      NemoError: the path and everything that does not fit.
    """
    path = os.fspath(path)
    with errors(path), _opened(path) as (state, config, tokenizer):
        if like is not None:
            config, tokenizer = _read_like(os.fspath(like))
        if config is None:
            raise NemoError(
                f"{path} holds weights without a config; name the model that they belong to: {LIKE}"
            )
        return _model(path, state, config, tokenizer)


def from_state(state, config, tokenizer=None, what="the weights"):
    """The NemoModel of a state dict {key: array} and a SentencePiece model's bytes; `config` is
    NeMo's, or the nemo_config.Settings themselves.

    Raises:
      NemoError: as `read`.
    """
    with errors(what):
        return _model(what, state, config, tokenizer)


@contextlib.contextmanager
def errors(path, done="read", kind=NemoError):
    """Context in which what goes wrong becomes an error of a kind that names `path`."""
    try:
        yield
    except OSError as e:
        name = path if done == "written" else e.filename or path
        raise kind(f"{name} cannot be {done}: {e.strerror or e}") from e
    except ValueError as e:  # of the parts: archive, YAML, pickle, table, settings, tokenizer
        if isinstance(e, kind) and path in str(e):
            raise
        raise kind(str(e) if path in str(e) else f"{path}: {e}") from e
    except (LookupError, TypeError, AttributeError, ArithmeticError) as e:  # no check names it
        raise kind(f"{path}: malformed: {type(e).__name__} {e}") from e


@contextlib.contextmanager
def _opened(path):
    """Context of (state dict, config or None, bytes of the SentencePiece model or None)."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:
        saved = torch_file.read(path)
        yield _state_dict(saved, path), _hyper_parameters(saved), None
        return
    with nemo_archive.opened(path) as archive:
        config = _config(archive)
        start, size = archive.member(nemo_archive.WEIGHTS)
        try:
            saved = torch_file.read(archive.tar, start=start, size=size)
        except torch_file.TorchFileError as e:
            reason = str(e).removeprefix(f"{archive.tar}: ")
            raise NemoError(f"{path}: {nemo_archive.WEIGHTS}: {reason}") from e
        yield _state_dict(saved, path), config, _tokenizer(archive, config)


def _read_like(path):
    """(config, bytes of the SentencePiece model or None) of a .nemo, or of a YAML file."""
    if path.endswith((".yaml", ".yml")):
        with open(path, "rb") as file:
            return plain_yaml.load(file.read()), None
    with nemo_archive.opened(path) as archive:
        config = _config(archive)
        return config, _tokenizer(archive, config)


def _config(archive):
    config = plain_yaml.load(archive.read(nemo_archive.CONFIG))
    if not isinstance(config, dict):
        raise NemoError(f"{archive.path}: {nemo_archive.CONFIG} is not a mapping")
    return config


def _state_dict(saved, path):
    """{key: array} of what was saved: a state dict, or a dict with "state_dict"."""
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, np.ndarray) for key, value in state.items()
    ):
        raise NemoError(f"{path}: neither a state dict nor a dict with state_dict in it")
    return state


def _hyper_parameters(saved):
    """The model's config in a Lightning checkpoint, if it has one."""
    found = plain_yaml.plain(saved.get("hyper_parameters")) if isinstance(saved, dict) else None
    if isinstance(found, dict) and isinstance(found.get("cfg"), dict):
        found = found["cfg"]
    return found if isinstance(found, dict) and "encoder" in found else None


def _tokenizer(archive, config):
    """The bytes of the archive's SentencePiece model; None for Canary's aggregate."""
    section = plain_yaml.resolve(config, ("tokenizer",)).get("tokenizer")
    if not isinstance(section, dict):
        raise NemoError(f"{archive.path}: the config has no tokenizer")
    kind, name = section.get("type"), section.get("model_path")
    if kind == "agg":
        return None
    if kind != "bpe":  # NeMo's word for all of SentencePiece
        raise NemoError(f"{archive.path}: a tokenizer of type {kind!r}; known are bpe and agg")
    if not isinstance(name, str) or not name.startswith("nemo:"):
        raise NemoError(
            f"{archive.path}: tokenizer.model_path is {name!r}, not a member of the archive "
            '("nemo:..."), so the tokenizer is not in it'
        )
    return archive.read(name)


def _model(path, state, config, tokenizer):
    joint = 1 if "joint.joint_net.1.weight" in state else 2  # joint_net's linear layer, see `rows`
    biases = (f"joint.joint_net.{joint}.bias", "decoder.decoder_layers.0.bias")
    head = next((state[key].size for key in biases if key in state), None)  # outputs
    if isinstance(config, nemo_config.Settings):
        model, nemo, config = config, {}, {}
    else:
        model, nemo = nemo_config.parse(config, head)
    buffers = {key: np.array(v) for key, v in state.items() if re.fullmatch(BUFFERS, key)}
    vocab_size = max(1, (head or 2) - 1)  # pieces: without the blank and the durations
    if model.kind in TRANSDUCERS:
        vocab_size = model.sections["decoder"]["vocab_size"]
    problems = [
        *nemo_weights.layers(model.sections, state),
        *nemo_weights.buffers(buffers, model.sections["front_end"]),
        *nemo_weights.vocabulary(model.kind, nemo, tokenizer, vocab_size),
    ]
    want, variables = shapes(model, vocab_size), None
    names = rows(model, want, joint)
    try:
        variables = table.convert(names, state, want, what="the weights")
    except table.TableError as e:
        problems.append(str(e))
    if problems:
        raise NemoError(f"{path}: " + "\n".join(problems))
    _note_precision(state, buffers)
    return NemoModel(
        kind=model.kind,
        config=model.sections,
        tokenizer=SentencePieceTokenizer(tokenizer).to_dict() if tokenizer else None,
        variables=jax.tree.map(lambda x: lazy.cast(x, np.float32), variables),
        nemo_config=config,
        buffers=buffers,
    )


def _note_precision(state, buffers):
    """Warns where weights are of another precision than the f32 that they become."""
    floats = {}
    for key, array in state.items():
        if key not in buffers and array.dtype != np.float32 and array.dtype.kind in "fV":
            floats.setdefault(array.dtype.name, []).append(array)
    for name, arrays in floats.items():
        text = f"weights of {name} become float32, here and in what is written from them"
        if arrays[0].dtype.itemsize > 4:
            lost = sum(not np.array_equal(a, a.astype(np.float32), equal_nan=True) for a in arrays)
            text += f": {lost} of {len(arrays)} tensors lose digits"
        warnings.warn(text, stacklevel=4)


def owned(model):
    """The model with its weights in memory of their own."""
    return dataclasses.replace(model, variables=jax.tree.map(lazy.owned, model.variables))


# ---- writing -------------------------------------------------------------------------------------


def write(path, model):
    """Writes a .nemo that NeMo restores (strictly) and `read` reads back bit for bit.

    What the model's nemo_config says besides its settings (optim, data sets ...) stays in it.
    The file appears whole or not at all.

    Raises:
      NemoError: a kind, setting or parameter that NeMo does not have, or no tokenizer.
    """
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise NemoError(f"{os.fspath(path)} cannot be written: there is no folder {folder}")
    with errors(os.fspath(path), "written"):
        settings = nemo_config.Settings(model.kind, model.config)
        tokenizer = sentencepiece(model)
        base = model.nemo_config
        if "encoder" not in base and isinstance(base.get("model"), dict):
            base = base["model"]
        config = nemo_config.write(settings, tokenizer.texts, base)
        vocab_txt, vocab_tsv = sentencepiece_model.vocab_txt, sentencepiece_model.vocab_tsv
        members, section = {}, {"dir": "", "type": "bpe"}
        for key, name, content in (
            ("model_path", "tokenizer.model", tokenizer.to_bytes()),
            ("vocab_path", "vocab.txt", vocab_txt(tokenizer).encode()),
            ("spe_tokenizer_vocab", "tokenizer.vocab", vocab_tsv(tokenizer).encode()),
        ):
            member = f"{uuid.uuid4().hex}_{name}"
            members[member], section[key] = content, f"nemo:{member}"
        _check_artefacts(config)
        config["tokenizer"] = section
        members[nemo_archive.CONFIG] = plain_yaml.dump(config)
        state = state_dict(model)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".jasr-") as temporary:
            weights = os.path.join(temporary, nemo_archive.WEIGHTS)
            torch_file.write(weights, state)
            nemo_archive.write(path, {**members, nemo_archive.WEIGHTS: weights})


def _check_artefacts(config):
    """Raises where the config refers to artefacts of its file that are no tokenizers."""
    for path, value in tree.flatten(config).items():
        if str(value).startswith("nemo:") and not path.startswith("tokenizer/"):
            raise NemoError(
                f"the config refers to {value!r} in {path.replace('/', '.')}, a file that is not "
                "kept with the model; set it to None in nemo_config"
            )


def sentencepiece(model):
    """The sentencepiece_model.Model of a NemoModel's tokenizer."""
    if not model.tokenizer or model.tokenizer.get("kind") != "sentencepiece":
        raise NemoError("NeMo's model needs a SentencePiece tokenizer, and this one has none")
    return sentencepiece_model.Model.from_bytes(base64.b64decode(model.tokenizer["model"]))


def state_dict(model):
    """{key: array-like} that NeMo's class loads strictly: weights as views, and buffers.

    Raises:
      table.TableError, tree.TreeError: parameters that the settings do not have, or that miss.
    """
    settings = nemo_config.Settings(model.kind, model.config)
    want, what = shapes(settings, len(sentencepiece(model).pieces)), "the model to be written"
    tree.compare(want, model.variables, what=what)
    index = 1 if not model.config.get("joint", {}).get("dropout", 1) else 2
    state = table.invert(rows(settings, want, index), model.variables, what=what)
    made = nemo_weights.featurizer(model.config["front_end"])
    buffers = {key: make() for key, (_, make) in made.items()}
    for key in state:
        if key.endswith(".running_mean"):
            count = key.replace("running_mean", "num_batches_tracked")
            buffers[count] = np.array(0, np.int64)
    return {**state, **{key: model.buffers.get(key, value) for key, value in buffers.items()}}
