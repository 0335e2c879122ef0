r"""Checkpoints of the original LaCT ASR (NeverWL/LaCT, lact_asr): read, and written so that the
original loads them.

A run of the original leaves checkpoint-step-N.pt, best_model.pt and latest_checkpoint.pt, each
{"model_state_dict", "config", "optimizer_state_dict", ...}, beside config.json. Its vocabulary
file, if there is one, has a character a line; the original's own reader strips the lines and so
loses the space, which shifts every id after it (its published 91.9 % word error rate). Here a line
that is a space is the space.
"""

import dataclasses
import json
import os
import pathlib
import re

import jax
import numpy as np

from jasr import settings, tree
from jasr.audio import HTK, FrontEndConfig, features
from jasr.interop import lazy, table, torch_file
from jasr.interop.table import Row
from jasr.seam import Original
from jasr.systems.lact.model import LactConfig, LactCtc, sinusoids
from jasr.text import CharTokenizer, from_dict

BLANK = "<blank>"
# The characters of the original's LibriSpeech runs (its logs, train-clean-100 and -360 alike).
LIBRISPEECH = (BLANK, *" etaonihsrdlumcwfgypbvk'xjqz")
VOCABULARY_FILES = ("vocab.txt", "vocabulary.txt", "vocab.json")
_FIELDS = tuple(f.name for f in dataclasses.fields(LactConfig))
OURS = _FIELDS[_FIELDS.index("fw_base_lr") :]  # not in the original's config


class LactFileError(ValueError):
    """A checkpoint of the original that cannot be read, or a model that it could not load."""


def is_lact(path):
    """Whether `path` looks like the original's: a .pt file or a directory of its own."""
    path = pathlib.Path(path)
    if not path.is_dir():
        return path.is_file() and path.suffix in (".pt", ".pth", ".bin")
    try:
        kind = json.loads((path / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    return kind == "lact_asr" or find_weights(path) is not None


def find_weights(directory):
    """The weights file of a run's directory: the best, the latest, or the highest step."""
    directory = pathlib.Path(directory)
    for name in ("best_model.pt", "latest_checkpoint.pt"):
        if (directory / name).is_file():
            return directory / name
    steps = {
        int(match[1]): path
        for path in directory.glob("checkpoint-step-*.pt")
        if (match := re.fullmatch(r"checkpoint-step-(\d+)\.pt", path.name))
    }
    return steps[max(steps)] if steps else None


def read_lact(path):
    """(LactConfig, variables {"params", "batch_stats"} of numpy arrays, vocabulary) of the
    original: the characters by token id, of the file beside the weights.

    path: a run's directory, or one of its .pt files (with model_state_dict, state_dict, or bare).
      The settings are the checkpoint's own, else config.json's beside it.

    Raises:
      LactFileError, torch_file.TorchFileError, table.TableError: what is missing, damaged or does
        not fit, with the file's name and what to do.
    """
    config, variables = read_weights(path)
    return config, variables, _vocabulary(weights_file(path), config)


def _vocabulary(weights, config):
    folder = weights.parent
    path = next((folder / name for name in VOCABULARY_FILES if (folder / name).is_file()), None)
    if path is None:
        raise LactFileError(
            f"{folder}: no vocabulary ({' or '.join(VOCABULARY_FILES)}). Write vocab.txt, one "
            'character a line in the order of the training run\'s log ("Vocabulary: [...]"). For '
            "the original's LibriSpeech runs: python -c \"from jasr.systems.lact import original "
            f"as lact; lact.write_vocabulary('{folder}/vocab.txt', lact.LIBRISPEECH)\""
        )
    vocabulary = read_vocabulary(path, config.ctc_vocab_size)
    if (blank := vocabulary.index(BLANK)) != config.ctc_blank_id:
        raise LactFileError(
            f"{path}: {BLANK} is token {blank}, but the model's ctc_blank_id is "
            f"{config.ctc_blank_id}"
        )
    return vocabulary


def read_weights(path):
    """(LactConfig, variables), as `read_lact`, of a checkpoint that need have no vocabulary."""
    config, variables = _mapped(path)
    # copies, since a run that goes on writes over the file that the arrays are mapped from
    return config, jax.tree.map(lazy.owned, variables)


def _mapped(path):
    """(LactConfig, variables), their arrays f32 and mapped from the file."""
    weights, config, state = _open(path)
    want = shapes(config)
    variables = table.convert(rows(want), state, want, what=f"{weights}: the weights")
    return config, jax.tree.map(lambda x, like: lazy.cast(x, like.dtype), variables, want)


def load_meta(path, like="", tokens=True):
    """{"config", "tokenizer", "step", "task"} as in the meta of a step of ours.

    tokens: False leaves out the tokenizer, which needs a vocabulary.
    """
    weights, config, _ = _open(path)
    meta = {"config": reference_config(settings.to_dict(config)), "step": 0, "task": "lact"}
    if tokens:
        meta["tokenizer"] = CharTokenizer(tuple(_vocabulary(weights, config)), "lower").to_dict()
    return meta


def weights_file(path):
    """The weights file at `path`, a run's directory or the file itself."""
    path = pathlib.Path(path)
    weights = find_weights(path) if path.is_dir() else path
    if weights and weights.is_file():
        return weights
    names = "best_model.pt, latest_checkpoint.pt or checkpoint-step-N.pt in it"
    raise LactFileError(f"{path}: no {names if path.is_dir() else 'such file'}")


def _open(path):
    """(weights file, LactConfig, {name: array}); the arrays are mapped from the file."""
    weights = weights_file(path)
    saved = torch_file.read(weights, opaque=("lact_asr_model", "__main__"))
    state = _state_dict(saved, weights)
    head = state.get("ctc_head.weight")
    if head is None or head.ndim != 2:
        raise LactFileError(f"{weights}: no ctc_head.weight; not a LaCT ASR checkpoint")
    return weights, _config(saved, weights, head.shape[0]), state


def _state_dict(saved, path):
    """{name: array} of what was saved, without the prefixes of torch.compile and data parallel."""
    if isinstance(saved, dict):
        names = ("model_state_dict", "state_dict", "model")
        saved = next((saved[n] for n in names if isinstance(saved.get(n), dict)), saved)
    if not isinstance(saved, dict) or not all(isinstance(v, np.ndarray) for v in saved.values()):
        raise LactFileError(
            f"{path}: neither a state_dict nor a dict with model_state_dict or state_dict in it"
        )
    for prefix in ("module.", "_orig_mod.", "module."):
        if saved and all(key.startswith(prefix) for key in saved):
            saved = {key.removeprefix(prefix): value for key, value in saved.items()}
    return saved


def _config(saved, weights, vocab_size):
    """The settings in the checkpoint, else those of config.json beside it."""
    mapping, where = saved.get("config") if isinstance(saved, dict) else None, f"{weights}: config"
    if not isinstance(mapping, dict) or "hidden_size" not in mapping:
        where = str(weights.parent / "config.json")
        try:
            mapping = json.loads(pathlib.Path(where).read_text("utf-8"))
        except OSError as e:
            raise LactFileError(
                f"{weights} holds no settings and {where} cannot be read ({e.strerror})"
            ) from e
        except ValueError as e:
            raise LactFileError(f"{where} is not JSON: {e}") from e
    return parse_config(mapping, where, vocab_size)


def parse_config(mapping, where="config.json", vocab_size=0):
    """LactConfig of the original's config.json; what only chooses kernels there is ignored.

    vocab_size: rows of the CTC head, which the original's training data overrode the config by.
    """
    if not isinstance(mapping, dict) or not isinstance(mapping.get("jasr", {}), dict):
        what = "it" if not isinstance(mapping, dict) else '"jasr"'
        raise LactFileError(f"{where}: {what} is no mapping of settings")
    if mapping.get("use_fused_kernel") and mapping.get("use_muon"):
        raise LactFileError(
            f"{where}: use_fused_kernel with use_muon orthogonalises two weights jointly, which is "
            "another model"
        )
    theirs = [name for name in _FIELDS if name not in OURS and mapping.get(name) is not None]
    values = {name: mapping[name] for name in theirs}
    if mapping.get("window_size", 0) is None:
        values["window_size"] = 0  # all keys
    if mapping.get("hidden_ratio", 0) is None and values.get("intermediate_size"):
        values["hidden_ratio"] = 0  # not used; 4 where both are null
    values["audio_feature_dim"] = values.get("n_mels", LactConfig.n_mels)  # what its layers read
    if vocab_size:
        values["ctc_vocab_size"] = vocab_size
    return settings.build(LactConfig, {**values, **mapping.get("jasr", {})}, where)


def reference_config(model):
    """The run's config (task, model, front_end) of the original's settings, from the model's."""
    front_end = {name: model[name] for name in ("sample_rate", "n_mels", "n_fft")}
    front_end |= {"win": model["win_length"], "hop": model["hop_length"]}
    for name in ("kind", "mel_norm", "preemph", "log_guard", "normalize"):
        front_end[name] = getattr(HTK, name)
    return {"task": "lact", "model": dict(model), "front_end": front_end}


def shapes(config):
    """Shapes of the model's variables, {"params", "batch_stats"}, without computing anything."""
    model = LactCtc(config)
    mel = jax.ShapeDtypeStruct((1, 8, config.n_mels), np.float32)
    length = jax.ShapeDtypeStruct((1,), np.int32)
    variables = jax.eval_shape(model.init, {"params": jax.random.key(0)}, mel, length)
    return {name: variables[name] for name in ("params", "batch_stats")}


def rows(want):
    """The table from the original's names to ours, of the `shapes` of a model."""
    extractor = r"model\.audio_feature_extractor\.(mel_extractor\..*|positional_encoding\.pe)"
    rotary = r"model\.layers\.\d+\.attn\.rotary\.inv_freq"
    return (*table.torch_rows(want), Row(extractor, None), Row(rotary, None))


# ---- vocabulary ----------------------------------------------------------------------------------


def read_vocabulary(path, size=0):
    """The characters by token id, from a file with one a line (or a JSON list).

    A line of one space is the space. Where an editor has trimmed that line to nothing, the one
    empty line is the space, for nothing else can be.

    Raises:
      LactFileError: entries that repeat, no "<blank>", or (given `size`) another number of entries.
    """
    text = pathlib.Path(path).read_text("utf-8-sig")
    if str(path).endswith(".json"):
        entries = json.loads(text)
        if isinstance(entries, dict):  # {character: id}
            entries = sorted(entries, key=entries.get)
    else:
        entries = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        if entries.count("") == 1 and " " not in entries:
            entries[entries.index("")] = " "
    if twice := sorted({e for e in entries if entries.count(e) > 1 or not e}):
        raise LactFileError(
            f"{path}: entries that are empty or stand there more than once: {twice}"
        )
    if BLANK not in entries:
        raise LactFileError(f"{path}: no {BLANK}")
    if size and len(entries) != size:
        hint = " The line with the space is missing: its place decides ids."
        raise LactFileError(
            f"{path} has {len(entries)} entries, the model's CTC head {size} rows; with another "
            f"vocabulary every text would be wrong.{'' if ' ' in entries else hint}"
        )
    return entries


def write_vocabulary(path, vocabulary):
    """Writes a character a line, the space as a line of one space, as the original does."""
    pathlib.Path(path).write_text("".join(f"{entry}\n" for entry in vocabulary), "utf-8")


# ---- export --------------------------------------------------------------------------------------


def write_lact(directory, config, variables, vocabulary, step=0):
    """Writes best_model.pt, config.json and vocab.txt, which the original loads (strictly) and
    `read_lact` reads back bit for bit. Returns the path of best_model.pt.

    Raises:
      LactFileError: settings that the original does not have, all in one error.
      table.TableError, tree.TreeError: parameters that it does not have, or that are missing.
    """
    changing = (  # what computes something else than the original, where it is not the default
        "subsampling conv_kernel lact_every lact_updates positions self_conditioning fw_base_lr"
    ).split()
    foreign = {n: v for n in changing if (v := getattr(config, n)) != getattr(LactConfig, n)}
    if config.lact_mode not in ("reference", "causal"):
        foreign["lact_mode"] = config.lact_mode
    if foreign:
        raise LactFileError(f"the original has no {foreign}")
    if len(vocabulary) != config.ctc_vocab_size:
        raise LactFileError(
            f"{len(vocabulary)} characters for a CTC head of {config.ctc_vocab_size} rows"
        )
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    want, what = shapes(config), "the model to be written"
    tree.compare(want, variables, what=what)
    state = table.invert(rows(want), variables, what=what)
    mapping, state = export_config(config), {**state, **_buffers(config)}
    saved = {"global_step": step, "epoch": 0, "model_state_dict": state, "config": mapping}
    directory = pathlib.Path(directory)
    os.makedirs(directory, exist_ok=True)
    torch_file.write(directory / "best_model.pt", saved)
    (directory / "config.json").write_text(json.dumps(mapping, indent=2) + "\n", "utf-8")
    write_vocabulary(directory / "vocab.txt", vocabulary)
    return directory / "best_model.pt"


def export_config(config):
    """The original's config.json of a LactConfig; what is ours stands under "jasr"."""
    values = settings.to_dict(config)
    ours = {name: values.pop(name) for name in OURS}
    defaults = settings.to_dict(LactConfig())
    ours = {name: value for name, value in ours.items() if value != defaults[name]}
    for name in ("intermediate_size", "hidden_ratio", "window_size"):
        values[name] = values[name] or None
    return {
        "model_type": "lact_asr",
        **values,
        "vocab_size": config.ctc_vocab_size,
        **({"jasr": ours} if ours else {}),
    }


def _buffers(config):
    """What the original keeps in its state_dict besides weights, for its strict loading."""
    extractor = "model.audio_feature_extractor"
    front_end = FrontEndConfig(**reference_config(settings.to_dict(config))["front_end"])
    positions = sinusoids(config.max_position_embeddings, config.hidden_size)
    mel = f"{extractor}.mel_extractor.mel_spectrogram"
    buffers = {
        f"{extractor}.positional_encoding.pe": np.asarray(positions)[None],
        f"{mel}.spectrogram.window": np.hanning(config.win_length + 1)[:-1].astype(np.float32),
        f"{mel}.mel_scale.fb": features.filter_bank(front_end, config.n_fft).T,
    }
    for i in range(config.audio_encoder_layers):
        norm = f"{extractor}.conv_layers.{4 * i + 1}"
        buffers[f"{norm}.num_batches_tracked"] = np.array(0, np.int64)
    return buffers


# ---- as an original ------------------------------------------------------------------------------


def _files(path, like=""):
    return (weights_file(path),) if not like and is_lact(path) else ()


def _leaves(path, like=""):
    return tree.flatten(_mapped(path)[1])


def _write(path, meta, leaves, options):
    """Writes the original's directory; raises as `write_lact`, and for another tokenizer or front
    end than the original's."""
    tokenizer = from_dict(meta["tokenizer"])
    if not isinstance(tokenizer, CharTokenizer):
        raise LactFileError("the original's tokens are characters, and those of this model are not")
    sizes = {"ctc_vocab_size": tokenizer.vocab_size, "ctc_blank_id": tokenizer.blank_id}
    config = settings.build(LactConfig, {**meta["config"]["model"], **sizes}, "config.model")
    theirs = reference_config(settings.to_dict(config))["front_end"]
    given = meta["config"].get("front_end", {})
    ours = settings.to_dict(settings.build(FrontEndConfig, given, "config.front_end"))
    if other := {k: ours[k] for k in theirs if ours[k] != theirs[k]}:
        raise LactFileError(f"the original's front end has no {other}")
    variables = {"params": {}, "batch_stats": {}, **tree.unflatten(leaves)}
    write_lact(path, config, variables, tokenizer.vocabulary, step=meta.get("step", 0))
    return ["lact"]


LACT = Original("lact", ("_lact", "-lact"), _files, load_meta, _leaves, _write)
