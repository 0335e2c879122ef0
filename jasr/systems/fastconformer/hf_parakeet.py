"""Parakeet directories of Hugging Face transformers (5.x): read, and written so that
ParakeetForCTC, ParakeetForRNNT or ParakeetForTDT loads them strictly.

A directory holds config.json, generation_config.json, model.safetensors, processor_config.json,
tokenizer.json and tokenizer_config.json. What transformers has no word for (the loss, dither ...)
stands under "jasr" in config.json, and tokenizer.model is the SentencePiece model itself;
directories without either, as the hub has them, are read too. Settings are hf_config's matter;
weights go through NeMo's names.
"""

import json
import os
import pathlib
import tempfile

from jasr.interop import safetensors_file, tokenizer_json
from jasr.systems.fastconformer import hf_config, nemo, nemo_config
from jasr.systems.fastconformer.hf_config import CLASSES, HfError
from jasr.text import sentencepiece_model

LARGEST = 64 << 20  # bytes of a JSON file
# Parts of transformers' names and of NeMo's; a key holds one of them or none.
NAMES = (
    ("encoder.subsampling.layers.", "encoder.pre_encode.conv."),
    ("encoder.subsampling.linear.", "encoder.pre_encode.out."),
    (".self_attn.q_proj.", ".self_attn.linear_q."),
    (".self_attn.k_proj.", ".self_attn.linear_k."),
    (".self_attn.v_proj.", ".self_attn.linear_v."),
    (".self_attn.o_proj.", ".self_attn.linear_out."),
    (".self_attn.relative_k_proj.", ".self_attn.linear_pos."),
    (".self_attn.bias_", ".self_attn.pos_bias_"),
    (".conv.norm.", ".conv.batch_norm."),
    ("ctc_head.", "decoder.decoder_layers.0."),
    ("encoder_projector.", "joint.enc."),
    ("decoder.decoder_projector.", "joint.pred."),
    ("decoder.embedding.", "decoder.prediction.embed."),
    ("decoder.lstm.", "decoder.prediction.dec_rnn.lstm."),
    ("joint.head.", "joint.joint_net.2."),
)


def is_parakeet(path):
    """Whether `path` is a directory with a Parakeet's config.json."""
    try:
        kind = _json(pathlib.Path(path) / "config.json").get("model_type")
        return kind in [f"parakeet_{kind}" for kind in CLASSES]
    except (OSError, HfError):
        return False


def rename(key, pairs):
    """The key with the first part of `pairs` that it holds replaced by that part's partner."""
    return next((key.replace(a, b, 1) for a, b in pairs if a in key), key)


# ---- reading -------------------------------------------------------------------------------------


def read(directory):
    """`mapped`, with every weight copied into memory."""
    return nemo.owned(mapped(directory))


def mapped(directory):
    """The NemoModel of a Parakeet directory, f32; its weights stay in the files until they are
    read.

    Raises:
      HfError: the path and everything that does not fit.
    """
    directory, state = pathlib.Path(directory), {}
    with nemo.errors(os.fspath(directory), kind=HfError):
        config = _json(directory / "config.json")
        kind, sections, size = hf_config.read(config, _extractor(directory))
        tokenizer = _tokenizer(directory, size)
        for path in weights_files(directory):
            state |= {rename(k, NAMES): array for k, array in safetensors_file.read(path).items()}
        settings, what = nemo_config.Settings(kind, sections), "the weights in NeMo's names"
        return nemo.from_state(state, settings, tokenizer.to_bytes(), what)


def _json(path):
    if path.stat().st_size > LARGEST:
        raise HfError(f"{path.name} has {path.stat().st_size} bytes, more than {LARGEST}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise HfError(f"{path.name} is not JSON: {e}") from e
    if not isinstance(content, dict):
        raise HfError(f"{path.name} is not a mapping")
    return content


def _extractor(directory):
    """The feature extractor's settings, from where transformers 5 or 4 writes them."""
    if (directory / "processor_config.json").is_file():
        found = _json(directory / "processor_config.json").get("feature_extractor")
        if isinstance(found, dict):
            return found
    return _json(directory / "preprocessor_config.json")


def weights_files(directory):
    """Paths of model.safetensors, or of the files that its index names."""
    directory = pathlib.Path(directory)
    index, whole = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if whole.is_file() or not index.is_file():
        return (whole,)
    files = _json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise HfError(f"{index.name}: weight_map is no mapping of tensors to files")
    names = sorted(set(files.values()))
    if any(name != os.path.basename(name) or not name.endswith(".safetensors") for name in names):
        raise HfError(f"{index.name} names files outside of the directory")
    return tuple(directory / name for name in names)


def _tokenizer(directory, size):
    path = directory / "tokenizer.model"
    if path.is_file():
        model = sentencepiece_model.Model.from_file(path)
    else:
        model = tokenizer_json.from_json(_json(directory / "tokenizer.json"), size)
    if len(model.pieces) != size:
        raise HfError(f"the tokenizer has {len(model.pieces)} pieces, the head {size}")
    return model


# ---- writing -------------------------------------------------------------------------------------


def write(directory, model):
    """Writes a NemoModel of kind "ctc", "rnnt" or "tdt" as a Parakeet directory.

    A new directory appears whole or not at all; in one that exists, files of the same names are
    replaced after everything has been written beside it.

    Raises:
      HfError: lists what transformers does not have, such as what NeMo before 2.5 computed.
    """
    if foreign := hf_config.foreign(model):
        raise HfError("transformers' Parakeet does not have: " + "; ".join(foreign))
    tokenizer = nemo.sentencepiece(model)
    size = len(tokenizer.pieces)
    back = [(b, a) for a, b in NAMES] + [("joint.joint_net.1.", "joint.head.")]
    state = {rename(key, back): array for key, array in nemo.state_dict(model).items()}
    state = {key: array for key, array in state.items() if not key.startswith("preprocessor.")}
    blank = "<pad>" if model.kind == "ctc" and "<pad>" not in tokenizer.texts else "<blank>"
    pad = "<pad>" if model.kind == "tdt" and "<pad>" in tokenizer.texts else blank
    ids = {**{text: i for i, text in enumerate(tokenizer.texts)}, blank: size}
    unknown = next(p.text for p in tokenizer.pieces if p.type == sentencepiece_model.UNKNOWN)
    files = {
        **hf_config.files(model, size, ids[pad]),
        "tokenizer.json": tokenizer_json.to_json(tokenizer, (blank,)),
        "tokenizer_config.json": {
            "tokenizer_class": "ParakeetTokenizer",
            "backend": "tokenizers",
            "clean_up_tokenization_spaces": False,
            "pad_token": pad,
            "unk_token": unknown,
            "processor_class": "ParakeetProcessor",
        },
    }
    directory = pathlib.Path(directory).resolve()
    os.makedirs(directory.parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".jasr-") as temporary:
        made = pathlib.Path(temporary) / directory.name
        made.mkdir()
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (made / name).write_text(text + "\n", "utf-8")
        (made / "tokenizer.model").write_bytes(tokenizer.to_bytes())
        safetensors_file.write(made / "model.safetensors", state)
        if not directory.exists():
            os.rename(made, directory)
            return
        for name in os.listdir(made):
            os.replace(made / name, directory / name)
