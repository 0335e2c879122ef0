"""What in a NeMo file does not belong together: tokenizer and head, config and layers, front end
and the buffers that NeMo keeps of it. Each gives a list of sentences, empty where all is well."""

import re

import jax.numpy as jnp
import numpy as np

from jasr import tree
from jasr.audio import features
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.text import sentencepiece_model

FEATURIZER = "preprocessor.featurizer"


def vocabulary(kind, nemo, tokenizer, vocab_size):
    """What the tokenizer and the config say that differs from the head's number of pieces, and
    where the config lists other pieces than the tokenizer has."""
    if kind == "encoder":
        return []
    said, listed = {}, {}
    model = sentencepiece_model.Model.from_bytes(tokenizer) if tokenizer is not None else None
    if model is not None:
        said["the tokenizer has"] = len(model.pieces)
    places = {"ctc": ("decoder",), "hybrid": ("joint", "aux_ctc.decoder")}.get(kind, ("joint",))
    for name in places:
        pieces = tree.flatten(nemo).get(f"{name}.vocabulary".replace(".", "/"))
        if isinstance(pieces, list) and pieces:
            said[f"{name}.vocabulary of the config has"] = len(pieces)
            listed[name] = pieces
    problems = [
        f"{what} {size} pieces, the head {vocab_size}: every text would be wrong"
        for what, size in said.items()
        if size != vocab_size
    ]
    return problems + [
        f"the tokenizer is not the one of {name}.vocabulary of the config: {difference}; every "
        "text would be wrong"
        for name, pieces in listed.items()
        if model is not None and (difference := _difference(pieces, model))
    ]


def _difference(listed, model):
    """How a config's list of pieces differs from a SentencePiece model's, in words; "" if it does
    not or cannot be compared. NeMo 1.0 listed <unk> and the lines of vocab.txt ("x", "##x")."""
    texts = model.texts
    if len(listed) != len(texts) or not all(isinstance(piece, str) for piece in listed):
        return ""
    if listed[1:] == sentencepiece_model.vocab_txt(model).split("\n")[:-1]:
        return ""
    wrong = [i for i, (a, b) in enumerate(zip(listed, texts, strict=True)) if a != b]
    shown = ", ".join(f"{i}: {listed[i]!r}, the tokenizer's {texts[i]!r}" for i in wrong[:5])
    more = " ..." if len(wrong) > 5 else ""
    return f"{len(wrong)} of {len(texts)} pieces differ ({shown}{more})" if wrong else ""


def layers(sections, state):
    """Where the config has another number of layers than the weights, or says that layers share
    what differs."""
    problems = []
    found = {match[1] for key in state if (match := re.match(r"encoder\.layers\.(\d+)\.", key))}
    said = sections["encoder"]["n_layers"]
    if len(found) != said:
        text = f"encoder.n_layers of the config is {said}, the weights have {len(found)} layers"
        problems.append(text)
    if FastConformerConfig(**sections["encoder"]).tied_biases:
        for key, bias in state.items():
            if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(self_attn\.pos_bias_[uv])", key):
                number, rest = match.groups()
                if not np.array_equal(bias, state.get(f"encoder.layers.0.{rest}")):
                    problems.append(f"untie_biases is false, but layer {number} has its own {rest}")
    return problems


def buffers(stored, front_end):
    """Where the stored window and filters differ from what the front end computes (1e-5, or the
    rounding of the dtype that they are stored in)."""
    problems = []
    for key, (shape, compute) in featurizer(front_end).items():
        got = stored.get(key)
        if got is None:
            continue
        if got.shape != shape or not jnp.issubdtype(got.dtype, jnp.floating):
            problems.append(f"{key} {got.shape}, but the config's front end has {shape}")
            continue
        want = compute()
        difference = np.abs(got.astype(np.float32) - want)
        if not np.all(difference <= 1e-5 + float(jnp.finfo(got.dtype).eps) * np.abs(want)):
            problems.append(f"{key} differs from the config's front end by {difference.max():.2g}")
    return problems


def featurizer(front_end):
    """{key: (shape, function that computes it)} of the buffers that NeMo's featurizer keeps."""
    cfg = features.FrontEndConfig(**front_end)
    n_fft = cfg.n_fft or 1 << (cfg.win - 1).bit_length()
    bins = n_fft // 2 + 1
    return {
        f"{FEATURIZER}.window": ((cfg.win,), lambda: features.stft_window(cfg)),
        f"{FEATURIZER}.fb": (
            (1, cfg.n_mels, bins),
            lambda: features.filter_bank(cfg, n_fft)[None],
        ),
    }
