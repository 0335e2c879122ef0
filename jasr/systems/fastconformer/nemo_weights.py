"""The weights of NeMo's models: names and shapes, and what in a file does not belong together.

Parameter paths are NeMo's: `encoder.layers.0.self_attn.linear_q.weight` is
params/encoder/layers_0/self_attn/linear_q/kernel.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from jasr import tree
from jasr.audio import features
from jasr.interop.table import Row, torch_rows
from jasr.models.fastconformer.encoder import FastConformer
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.systems.fastconformer.model import CtcHead
from jasr.systems.fastconformer.transducer import Joint, JointConfig, Prediction, PredictionConfig
from jasr.text import sentencepiece_model

TRANSDUCERS = ("rnnt", "tdt", "hybrid")


def shapes(model, vocab_size):
    """Shapes {"params", "batch_stats"} of a model's variables, without computing anything.

    Args:
      model: nemo_config.Settings. vocab_size: pieces, without blank.
    """
    config = FastConformerConfig(**model.sections["encoder"])
    found = {kind: {"encoder": part} for kind, part in _encoder_shapes(config).items()}
    params = found["params"]
    if model.kind in ("ctc", "hybrid"):
        name = "decoder" if model.kind == "ctc" else "ctc_decoder"
        params[name] = _init(CtcHead(vocab_size + 1), _floats(1, 1, config.out_dim))["params"]
    if model.kind in TRANSDUCERS:
        joint = JointConfig(**model.sections["joint"])
        sides = (_floats(1, 1, size) for size in (joint.encoder_hidden, joint.pred_hidden))
        tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
        prediction = PredictionConfig(**model.sections["decoder"])
        params["decoder"] = _init(Prediction(prediction), tokens)["params"]
        params["joint"] = _init(Joint(joint), *sides)["params"]
    return {"params": params, "batch_stats": found.get("batch_stats", {})}


def _encoder_shapes(config):
    """Those of an encoder's variables. Only its first two layers are traced, which takes a tenth of
    a second each: the others are like the second."""
    few = {"n_layers": min(2, config.n_layers)}
    if config.has_reduction and config.reduction_position > 0:
        few["reduction_position"] = 0
    mel = _floats(1, 16 * config.subsampling_factor, config.feat_in)
    length = jax.ShapeDtypeStruct((1,), np.int32)
    variables = _init(FastConformer(dataclasses.replace(config, **few)), mel, length)
    for part in variables.values():
        for number in range(2, config.n_layers if "layers_1" in part else 0):
            part[f"layers_{number}"] = part["layers_1"]
    return variables


def _init(model, *args):
    return jax.eval_shape(model.init, {"params": jax.random.key(0)}, *args)


def _floats(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def rows(model, want, joint_index=2):
    """Table from the names of NeMo's state dict to ours.

    Args:
      model: nemo_config.Settings. want: its `shapes`.
      joint_index: where joint_net's linear layer stands, 2 behind a dropout and 1 without.
    """
    found = torch_rows(want, {"joint_net": f"joint_net.{joint_index}"})
    if FastConformerConfig(**model.sections["encoder"]).tied_biases:
        # one parameter under the names of all layers; ours is layer 0's
        source = r"encoder\.layers\.(\d+)\.self_attn\.pos_bias_(u|v)"
        target, copies = r"layers_0/self_attn/pos_bias_\2", model.sections["encoder"]["n_layers"]
        found = [row for row in found if "pos_bias" not in row.source]
        found.append(Row(source, f"params/encoder/{target}", copies=copies))
    unread = r"preprocessor\.featurizer\.(window|fb)|encoder\.pos_enc\.pe"
    if model.kind == "encoder":
        unread += r"|(transf_encoder|transf_decoder|log_softmax|encoder_decoder_proj)\..*"
    return (*found, Row(unread, None))


# ---- sentences on tokenizer and head, layers, buffers; none where all is well --------------------

FEATURIZER = "preprocessor.featurizer"


def vocabulary(kind, nemo, tokenizer, vocab_size):
    """What the tokenizer and the config say that differs from the head's number of pieces, and
    where the config lists other pieces than the tokenizer has."""
    if kind == "encoder":
        return []
    problems, flat = [], tree.flatten(nemo)
    wrong = "every text would be wrong"

    def check(what, size):
        if size != vocab_size:
            problems.append(f"{what} {size} pieces, the head {vocab_size}: {wrong}")

    model = sentencepiece_model.Model.from_bytes(tokenizer) if tokenizer is not None else None
    if model is not None:
        check("the tokenizer has", len(model.pieces))
    for name in {"ctc": ("decoder",), "hybrid": ("joint", "aux_ctc.decoder")}.get(kind, ("joint",)):
        pieces = flat.get(f"{name}.vocabulary".replace(".", "/"))
        if not isinstance(pieces, list) or not pieces:
            continue
        check(f"{name}.vocabulary of the config has", len(pieces))
        if model is not None and (difference := _difference(pieces, model)):
            problems.append(
                f"the tokenizer is not the one of {name}.vocabulary of the config: {difference}; "
                f"{wrong}"
            )
    return problems


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
    filters = (1, cfg.n_mels, bins), lambda: features.filter_bank(cfg, n_fft)[None]
    window = (cfg.win,), lambda: features.stft_window(cfg)
    return {f"{FEATURIZER}.window": window, f"{FEATURIZER}.fb": filters}
