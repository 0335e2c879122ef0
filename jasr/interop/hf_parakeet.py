"""Parakeet directories of Hugging Face transformers (5.x): read, and written so that
ParakeetForCTC, ParakeetForRNNT or ParakeetForTDT loads them strictly.

A directory holds config.json, generation_config.json, model.safetensors, processor_config.json,
tokenizer.json and tokenizer_config.json. What transformers has no word for (the loss, dither ...)
stands under "jasr" in config.json, and tokenizer.model is the SentencePiece model itself;
directories without either, as the hub has them, are read too. Weights go through NeMo's names.
"""

import dataclasses
import json
import os
import pathlib

from jasr import sentencepiece_model
from jasr.features import FrontEndConfig
from jasr.interop import hf_tokenizer, nemo, nemo_config, safetensors_file
from jasr.models.fastconformer_config import FastConformerConfig
from jasr.models.transducer import JointConfig, PredictionConfig
from jasr.settings import to_dict

LARGEST = 64 << 20  # bytes of a JSON file
CLASSES = {"ctc": "ParakeetForCTC", "rnnt": "ParakeetForRNNT", "tdt": "ParakeetForTDT"}
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
# FastConformerConfig's field by the key of transformers' encoder_config.
_ENCODER = {
    "num_mel_bins": "feat_in",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "subsampling_factor": "subsampling_factor",
    "subsampling_conv_channels": "subsampling_conv_channels",
    "conv_kernel_size": "conv_kernel_size",
    "attention_bias": "use_bias",
    "scale_input": "xscaling",
    "dropout": "dropout_pre_encoder",
    "activation_dropout": "dropout",
    "attention_dropout": "dropout_att",
    "dropout_positions": "dropout_emb",
    "layerdrop": "stochastic_depth_drop_prob",
}
# What transformers' encoder always is.
_FIXED = {
    "feat_out": (-1,),
    "subsampling": ("dw_striding",),
    "causal_downsampling": (False,),
    "self_attention_model": ("rel_pos",),
    "att_context_style": ("regular",),
    "conv_norm_type": ("batch_norm",),
    "conv_context_size": (None,),
    "masked_subsampling": (True,),
}
# What its feature extractor always does, apart from sizes and pre-emphasis; dither is for training.
_FRONT_END = (
    "kind window low_hz high_hz mel_norm mag_power log log_guard log_guard_type normalize pad_to "
    "pad_value exact_pad frame_splicing"
).split()
_EXTRACTOR = {
    "feature_size": "n_mels",
    "sampling_rate": "sample_rate",
    "hop_length": "hop",
    "win_length": "win",
    "n_fft": "n_fft",
    "preemphasis": "preemph",
}


class HfError(ValueError):
    """A directory that is no Parakeet of transformers, or a model that transformers lacks."""


def is_parakeet(path):
    """Whether `path` is a directory with a Parakeet's config.json."""
    try:
        text = (pathlib.Path(path) / "config.json").read_text("utf-8")
        return json.loads(text)["model_type"] in [f"parakeet_{kind}" for kind in CLASSES]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def rename(key, pairs):
    """The key with the first part of `pairs` that it holds replaced by that part's partner."""
    return next((key.replace(a, b, 1) for a, b in pairs if a in key), key)


# ---- reading -------------------------------------------------------------------------------------


def read(directory):
    """The NemoModel of a Parakeet directory, f32, with a config that NeMo understands.

    Raises:
      HfError: the path and everything that does not fit.
    """
    directory = pathlib.Path(directory)
    try:
        config = _json(directory / "config.json")
        kind = str(config.get("model_type")).removeprefix("parakeet_")
        if kind not in CLASSES:
            raise HfError(f"model_type {config.get('model_type')!r} is not a Parakeet with a head")
        vocab_size = int(config["vocab_size"]) - 1
        sections = _sections(kind, config, vocab_size, _extractor(directory))
        tokenizer = _tokenizer(directory, vocab_size)
        settings = nemo_config.Settings(kind, sections)
        state = {rename(key, NAMES): array for key, array in _weights(directory).items()}
        written = nemo_config.write(settings, tokenizer.texts)
        model = nemo.from_state(state, written, tokenizer.to_bytes(), "the weights in NeMo's names")
        return dataclasses.replace(model, config=sections)
    except OSError as e:
        raise HfError(f"{directory}: {e.filename or ''} cannot be read: {e.strerror}") from e
    except (KeyError, TypeError) as e:
        raise HfError(f"{directory}: config.json is malformed: {type(e).__name__} {e}") from e
    except ValueError as e:
        raise HfError(f"{directory}: {e}") from e


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


def _weights(directory):
    """{name: array} of model.safetensors, or of the files that its index names."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (directory / names[0]).is_file():
        names = sorted(set(_json(index)["weight_map"].values()))
        if any(
            name != os.path.basename(name) or not name.endswith(".safetensors") for name in names
        ):
            raise HfError(f"{index.name} names files outside of the directory")
    state = {}
    for name in names:
        state |= safetensors_file.read(directory / name)
    return state


def _tokenizer(directory, size):
    path = directory / "tokenizer.model"
    if path.is_file():
        model = sentencepiece_model.Model.from_file(path)
    else:
        model = hf_tokenizer.from_json(_json(directory / "tokenizer.json"), size)
    if len(model.pieces) != size:
        raise HfError(f"the tokenizer has {len(model.pieces)} pieces, the head {size}")
    return model


def _sections(kind, config, size, extractor):
    encoder = config["encoder_config"]
    problems = [
        f"encoder_config.{key} is {encoder[key]!r}"
        for key, value in {
            "hidden_act": "silu",
            "subsampling_conv_kernel_size": 3,
            "subsampling_conv_stride": 2,
            "convolution_bias": encoder.get("attention_bias", True),
        }.items()
        if encoder.get(key, value) != value
    ]
    factor, rest = divmod(encoder["intermediate_size"], encoder["hidden_size"])
    if rest:
        problems.append(f"encoder_config.intermediate_size is {encoder['intermediate_size']}")
    if problems:
        raise HfError(f"not known here: {', '.join(problems)}")
    ours = config.get("jasr") or {}
    fields = {name: encoder[key] for key, name in _ENCODER.items() if key in encoder}
    fields |= {"ff_expansion_factor": factor, "subsampling": "dw_striding"}
    front_end = {name: extractor[key] for key, name in _EXTRACTOR.items() if key in extractor}
    front_end = {k: v for k, v in front_end.items() if v is not None}
    sections = {
        "front_end": to_dict(FrontEndConfig(**front_end, **ours.get("front_end", {}))),
        "encoder": to_dict(FastConformerConfig(**fields, **ours.get("encoder", {}))),
    }
    if kind == "ctc":
        reduction = config.get("ctc_loss_reduction", "mean")
        return {**sections, "loss": {"kind": "ctc", "reduction": reduction, **ours.get("loss", {})}}
    hidden, durations = config["decoder_hidden_size"], ()
    loss = {"kind": kind, "reduction": "mean_batch", "fastemit_lambda": 0.0, "clamp": -1.0}
    if kind == "tdt":
        durations = tuple(config["durations"])
        loss |= {"durations": durations, "sigma": 0.0, "omega": 0.0}
    decoder = PredictionConfig(
        vocab_size=size,
        pred_hidden=hidden,
        pred_rnn_layers=config["num_decoder_layers"],
        **ours.get("decoder", {}),
    )
    joint = JointConfig(
        num_classes=size,
        encoder_hidden=encoder["hidden_size"],
        pred_hidden=hidden,
        joint_hidden=hidden,
        num_extra_outputs=len(durations),
        activation=config["hidden_act"],
        **ours.get("joint", {}),
    )
    return {
        **sections,
        "decoder": to_dict(decoder),
        "joint": to_dict(joint),
        "loss": loss | ours.get("loss", {}),
        "decoding": {
            "strategy": "greedy_batch",
            "max_symbols": config["max_symbols_per_step"],
            **ours.get("decoding", {}),
        },
    }


# ---- writing -------------------------------------------------------------------------------------


def write(directory, model):
    """Writes a NemoModel of kind "ctc", "rnnt" or "tdt" as a Parakeet directory.

    transformers computes the front end and the subsampling of NeMo 2.5 and later; a model of an
    older NeMo is refused until its settings say otherwise (front_end.kind "nemo",
    encoder.masked_subsampling True), which changes the first and last frames of an utterance.

    Raises:
      HfError: lists what transformers does not have.
    """
    directory = pathlib.Path(directory)
    foreign = _foreign(model)
    if foreign:
        raise HfError("transformers' Parakeet does not have: " + "; ".join(foreign))
    tokenizer = nemo.sentencepiece(model)
    size = len(tokenizer.pieces)
    back = [(b, a) for a, b in NAMES] + [("joint.joint_net.1.", "joint.head.")]
    state = {
        rename(key, back): array
        for key, array in nemo.state_dict(model).items()
        if not key.startswith("preprocessor.")
    }
    blank = "<pad>" if model.kind == "ctc" and "<pad>" not in tokenizer.texts else "<blank>"
    pad = "<pad>" if model.kind == "tdt" and "<pad>" in tokenizer.texts else blank
    ids = {**{text: i for i, text in enumerate(tokenizer.texts)}, blank: size}
    os.makedirs(directory, exist_ok=True)
    files = {
        "config.json": _config(model, size, ids[pad]),
        "generation_config.json": _generation(model, size, ids[pad]),
        "processor_config.json": _processor(model),
        "tokenizer.json": hf_tokenizer.to_json(tokenizer, (blank,)),
        "tokenizer_config.json": {
            "tokenizer_class": "ParakeetTokenizer",
            "backend": "tokenizers",
            "clean_up_tokenization_spaces": False,
            "pad_token": pad,
            "unk_token": next(
                p.text for p in tokenizer.pieces if p.type == sentencepiece_model.UNKNOWN
            ),
            "processor_class": "ParakeetProcessor",
        },
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (directory / name).write_text(text + "\n", "utf-8")
    (directory / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    safetensors_file.write(directory / "model.safetensors", state)


def _foreign(model):
    """What of a model transformers' Parakeet cannot be, in words."""
    if model.kind not in CLASSES:
        return [f"the kind {model.kind!r}"]
    config, found = model.config, []
    encoder, front_end = FastConformerConfig(**config["encoder"]), config["front_end"]
    for name, allowed in _FIXED.items():
        if getattr(encoder, name) not in allowed:
            found.append(f"encoder.{name} {getattr(encoder, name)!r}")
    if encoder.contexts[0] != (-1, -1):
        found.append(f"encoder.att_context_size {encoder.att_context_size}")
    if encoder.has_reduction:
        found.append("encoder.reduction")
    if encoder.feat_in % encoder.subsampling_factor:
        found.append(f"encoder.feat_in {encoder.feat_in}, no multiple of the subsampling")
    usual = to_dict(FrontEndConfig())
    for name in _FRONT_END:
        if front_end[name] != usual[name]:
            found.append(f"front_end.{name} {front_end[name]!r}")
    if model.kind != "ctc":
        hidden, joint = config["decoder"]["pred_hidden"], config["joint"]["joint_hidden"]
        if not config["decoder"]["blank_as_pad"]:
            found.append("decoder.blank_as_pad False")
        if hidden != joint:
            found.append(f"decoder.pred_hidden {hidden} other than joint.joint_hidden {joint}")
        durations = config["loss"].get("durations", ())
        if tuple(durations) != tuple(range(len(durations))):
            found.append(f"loss.durations {durations}, for it takes their places for them")
    return found


def _config(model, size, pad):
    """config.json; transformers' words first, then ours for what it has no words for."""
    config = model.config
    encoder = FastConformerConfig(**config["encoder"])
    theirs = {key: getattr(encoder, name) for key, name in _ENCODER.items()}
    theirs |= {
        "model_type": "parakeet_encoder",
        "subsampling_conv_channels": encoder.conv_channels,
        "convolution_bias": encoder.use_bias,
        "intermediate_size": encoder.d_model * encoder.ff_expansion_factor,
        "hidden_act": "silu",
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
    }
    loss = dict(config["loss"])
    if model.kind == "ctc":
        head = {"ctc_loss_reduction": "mean" if loss["reduction"] == "mean" else "sum"}
        head["ctc_zero_infinity"] = True
    else:
        head = {
            "blank_token_id": size,
            "decoder_hidden_size": config["decoder"]["pred_hidden"],
            "num_decoder_layers": config["decoder"]["pred_rnn_layers"],
            "hidden_act": config["joint"]["activation"],
            "max_symbols_per_step": config["decoding"]["max_symbols"] or 10,
            "is_encoder_decoder": True,
        }
        if model.kind == "tdt":
            head["durations"] = list(loss.pop("durations"))
    ours = {
        "front_end": {"dither": config["front_end"]["dither"]},
        "encoder": _unsaid(encoder, {*_ENCODER.values(), *_FIXED, "ff_expansion_factor"}),
        "loss": loss,
    }
    if model.kind != "ctc":
        said = {"vocab_size", "pred_hidden", "pred_rnn_layers", "joint_hidden", "activation"}
        said |= {"num_classes", "encoder_hidden", "num_extra_outputs"}
        ours["decoder"] = _unsaid(PredictionConfig(**config["decoder"]), said)
        ours["joint"] = _unsaid(JointConfig(**config["joint"]), said)
        ours["decoding"] = dict(config["decoding"])
    return {
        "architectures": [CLASSES[model.kind]],
        "model_type": f"parakeet_{model.kind}",
        "dtype": "float32",
        "vocab_size": size + 1,
        "pad_token_id": pad,
        **head,
        "encoder_config": theirs,
        "jasr": ours,
    }


def _generation(model, size, pad):
    """generation_config.json; a TDT's durations stand behind the tokens among its logits."""
    config = {"pad_token_id": pad}
    if model.kind != "ctc":
        config["decoder_start_token_id"] = size
    if model.kind == "tdt":
        count = len(model.config["loss"]["durations"])
        config["suppress_tokens"] = list(range(size + 1, size + 1 + count))
    return config


def _unsaid(settings, said):
    """The fields of settings that transformers has no words for, where they are not usual."""
    usual = {f.name: f.default for f in dataclasses.fields(settings)}
    return {k: v for k, v in to_dict(settings).items() if k not in said and v != usual[k]}


def _processor(model):
    front_end = model.config["front_end"]
    return {
        "processor_class": "ParakeetProcessor",
        "blank_token": "<blank>",
        "decoder_type": model.kind,
        "feature_extractor": {
            "feature_extractor_type": "ParakeetFeatureExtractor",
            **{key: front_end[name] for key, name in _EXTRACTOR.items()},
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
        },
    }
