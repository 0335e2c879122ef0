"""config.json and the feature extractor of transformers' Parakeet (5.x) as our settings, and back.

transformers takes any key and ignores those that it does not know; here a key that is neither read
nor known to change nothing is refused with its value, as in NeMo's configs. transformers itself is
not needed.
"""

import dataclasses

from jasr.audio.features import FrontEndConfig
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.settings import to_dict
from jasr.systems.fastconformer import nemo_loss
from jasr.systems.fastconformer.transducer import JointConfig, PredictionConfig

CLASSES = {"ctc": "ParakeetForCTC", "rnnt": "ParakeetForRNNT", "tdt": "ParakeetForTDT"}
# FastConformerConfig's field and transformers' default, by the key of encoder_config.
_ENCODER = {
    "num_mel_bins": ("feat_in", 80),
    "num_hidden_layers": ("n_layers", 24),
    "hidden_size": ("d_model", 1024),
    "num_attention_heads": ("n_heads", 8),
    "subsampling_factor": ("subsampling_factor", 8),
    "subsampling_conv_channels": ("subsampling_conv_channels", 256),
    "conv_kernel_size": ("conv_kernel_size", 9),
    "attention_bias": ("use_bias", True),
    "scale_input": ("xscaling", True),
    "dropout": ("dropout_pre_encoder", 0.1),
    "activation_dropout": ("dropout", 0.1),
    "attention_dropout": ("dropout_att", 0.1),
    "dropout_positions": ("dropout_emb", 0.0),
    "layerdrop": ("stochastic_depth_drop_prob", 0.1),
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
# FrontEndConfig's field and transformers' default, by the key of the feature extractor.
_EXTRACTOR = {
    "feature_size": ("n_mels", 80),
    "sampling_rate": ("sample_rate", 16000),
    "hop_length": ("hop", 160),
    "win_length": ("win", 400),
    "n_fft": ("n_fft", 512),
    "preemphasis": ("preemph", 0.97),
}
# What transformers has words for, of PredictionConfig and JointConfig.
_SAID = {"vocab_size", "pred_hidden", "pred_rnn_layers", "joint_hidden", "activation"}
_SAID |= {"num_classes", "encoder_hidden", "num_extra_outputs"}
# Keys that are accepted with the value of what is done here.
_EXTRACTOR_ONLY_AS = {
    "feature_extractor_type": "ParakeetFeatureExtractor",
    "padding_side": "right",
    "padding_value": 0.0,
    "do_normalize": True,
}
# transformers' defaults of a head's keys, and of the key that holds the blank.
_CTC = {"ctc_loss_reduction": "mean", "ctc_zero_infinity": True}
_TRANSDUCER = {
    "decoder_hidden_size": 640,
    "num_decoder_layers": 2,
    "hidden_act": "relu",
    "max_symbols_per_step": 10,
}
_DURATIONS = [0, 1, 2, 3, 4]
_BLANK = {"ctc": ("pad_token_id", 1024)}
_BLANK |= dict.fromkeys(("rnnt", "tdt"), ("blank_token_id", 8192))
# Keys that change nothing of what a Parakeet computes: those of every config of transformers 4 and
# 5, the parameters of generation, which transformers 5 drops where they stand in config.json, and
# Parakeet's that are of initial values, of a limit or of the machine.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    attn_implementation auto_map chunk_size_feed_forward dtype id2label is_encoder_decoder label2id
    model_type name_or_path num_labels output_attentions output_hidden_states problem_type
    return_dict torch_dtype transformers_version

    add_cross_attention cross_attention_hidden_size finetuning_task is_decoder prefix pruned_heads
    task_specific_params tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class
    torchscript use_bfloat16

    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups
    num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p
    use_cache

    initializer_range max_position_embeddings processor_class return_attention_mask
    """.split()
)


class HfError(ValueError):
    """A directory that is no Parakeet of transformers, or a model that transformers lacks."""


# ---- reading -------------------------------------------------------------------------------------


def read(config, extractor):
    """(kind, sections of settings, number of pieces) of config.json and the feature extractor.

    What is not given has transformers' defaults.

    Raises:
      HfError: a value of another type, or a list of the keys that are not known here.
    """
    kind = str(config.get("model_type")).removeprefix("parakeet_")
    if kind not in CLASSES:
        raise HfError(f"model_type {config.get('model_type')!r} is not a Parakeet with a head")
    if "vocab_size" not in config:
        raise HfError("config.json has no vocab_size")
    size = _of_type(config["vocab_size"], 2, "vocab_size") - 1
    key, usual = _BLANK[kind]
    if config.get(key, usual) != size:
        said = "" if key in config else " by default"
        raise HfError(
            f"{key} is {config.get(key, usual)!r}{said}: the blank must be the last id, "
            f"vocab_size - 1 = {size}"
        )
    ours, encoder = _mapping(config, "jasr", {}), _mapping(config, "encoder_config")
    _check_known(kind, config, encoder, extractor, ours)
    sections = {
        "front_end": _front_end(extractor, ours),
        "encoder": _encoder(encoder, ours),
    }
    head = {
        name: _of_type(config.get(name, usual), usual, name)
        for name, usual in (_CTC if kind == "ctc" else _TRANSDUCER).items()
    }
    if kind == "ctc":
        loss = {"kind": "ctc", "reduction": head["ctc_loss_reduction"]}
        return kind, {**sections, "loss": _values(loss, ours, "loss")}, size
    durations = tuple(_durations(config)) if kind == "tdt" else ()
    return kind, {**sections, **_transducer(kind, sections, head, durations, size, ours)}, size


def _check_known(kind, config, encoder, extractor, ours):
    """HfError, listing what stands in the files and is not known here."""
    heads = _CTC if kind == "ctc" else {**_TRANSDUCER, "blank_token_id": None}
    heads = {*heads, "durations"} if kind == "tdt" else {*heads}
    encoder_only_as = {
        "model_type": "parakeet_encoder",
        "hidden_act": "silu",
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
        "convolution_bias": encoder.get("attention_bias", True),
        "num_key_value_heads": encoder.get("num_attention_heads", 8),
    }
    parts = ("front_end", "encoder", "loss") + (("decoder", "joint", "decoding") * (kind != "ctc"))
    unknown = [
        f"{where}{key} is {value!r:.100}"
        for where, section, known, only_as in (
            ("", config, {"vocab_size", "encoder_config", "jasr", *heads}, {}),
            ("encoder_config.", encoder, {*_ENCODER, "intermediate_size"}, encoder_only_as),
            ("feature_extractor.", extractor, _EXTRACTOR, _EXTRACTOR_ONLY_AS),
            ("jasr.", ours, parts, {}),
        )
        for key, value in section.items()
        if (value != only_as[key] if key in only_as else key not in known and key not in HARMLESS)
    ]
    if unknown:
        raise HfError(
            f"not known here: {', '.join(unknown)}. Take out of the file what changes nothing"
        )


def _mapping(section, key, default=None, where=""):
    value = section.get(key, default)
    if not isinstance(value, dict):
        raise HfError(f"{where}{key} is {value!r:.100}, not a mapping")
    return value


def _of_type(value, like, name):
    """`value`, which must be of the type of `like`: integers above 0, and finite as a float."""
    good = type(value) is type(like)
    if isinstance(like, float):
        good = type(value) in (int, float) and abs(value) < 1e30
    elif good and type(value) is int:
        good = value > 0
    if not good:
        wanted = {bool: "true or false", int: "an integer above 0", float: "a number"}
        raise HfError(f"{name} is {value!r:.100}, not {wanted.get(type(like), 'a string')}")
    return value


def _fields(section, table, where):
    """{our field: value} of the keys of a table; transformers' defaults where they miss."""
    return {
        field: _of_type(section.get(key, usual), usual, f"{where}.{key}")
        for key, (field, usual) in table.items()
    }


def _front_end(extractor, ours):
    if extractor.get("preemphasis", 0) is None:  # none
        extractor = {**extractor, "preemphasis": 0.0}
    given = FrontEndConfig(**_fields(extractor, _EXTRACTOR, "feature_extractor"))
    return to_dict(_with_ours(given, ours, "front_end", {name for name, _ in _EXTRACTOR.values()}))


def _encoder(encoder, ours):
    fields = _fields(encoder, _ENCODER, "encoder_config")
    inner = _of_type(encoder.get("intermediate_size", 4096), 1, "encoder_config.intermediate_size")
    factor, rest = divmod(inner, fields["d_model"])
    if rest:
        raise HfError(
            f"encoder_config.intermediate_size is {inner}, no multiple of hidden_size "
            f"{fields['d_model']}"
        )
    given = FastConformerConfig(**fields, ff_expansion_factor=factor, subsampling="dw_striding")
    return to_dict(_with_ours(given, ours, "encoder", {*fields, *_FIXED, "ff_expansion_factor"}))


def _durations(config):
    found = config.get("durations", _DURATIONS)
    if not nemo_loss.are_durations(found):
        raise HfError(f"durations is {found!r:.100}, not a list of frames, each once, one above 0")
    return found


def _transducer(kind, sections, head, durations, size, ours):
    hidden = head["decoder_hidden_size"]
    decoder = PredictionConfig(size, hidden, head["num_decoder_layers"])
    joint = JointConfig(
        num_classes=size,
        encoder_hidden=sections["encoder"]["d_model"],
        pred_hidden=hidden,
        joint_hidden=hidden,
        num_extra_outputs=len(durations),
        activation=head["hidden_act"],
    )
    loss = {"kind": kind, "reduction": "mean_batch", "fastemit_lambda": 0.0, "clamp": -1.0}
    if kind == "tdt":
        loss |= {"sigma": 0.0, "omega": 0.0}
    how = {"strategy": "greedy_batch", "max_symbols": head["max_symbols_per_step"]}
    loss = _values(loss, ours, "loss")
    if kind == "tdt":
        loss["durations"] = durations
    return {
        "decoder": to_dict(_with_ours(decoder, ours, "decoder", _SAID)),
        "joint": to_dict(_with_ours(joint, ours, "joint", _SAID)),
        "loss": loss,
        "decoding": _values(how, ours, "decoding"),
    }


def _with_ours(given, ours, name, said):
    """The settings with the fields of config.json's jasr section, which may not repeat `said`."""
    section = _mapping(ours, name, {}, "jasr.")
    known = {f.name for f in dataclasses.fields(given)} - said
    unknown = [f"jasr.{name}.{key}" for key in section if key not in known]
    if unknown:
        raise HfError(f"not known here, or said by another key: {', '.join(unknown)}")
    try:
        return dataclasses.replace(given, **section)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as e:
        raise HfError(f"jasr.{name} has a value of another type: {e}") from e


def _values(given, ours, name):
    """The same for a plain section; a task that is built of it checks its keys and types."""
    section = _mapping(ours, name, {}, "jasr.")
    if section.get("kind", given.get("kind")) != given.get("kind"):
        raise HfError(f"jasr.{name}.kind is {section['kind']!r:.100}, not {given.get('kind')!r}")
    return {**given, **section}


# ---- writing -------------------------------------------------------------------------------------


def foreign(model):
    """What of a model transformers' Parakeet cannot be, in words."""
    if model.kind == "hybrid":
        return ["the kind 'hybrid', of which convert --branch=transducer or --branch=ctc takes one"]
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
    if front_end["kind"] == "nemo_legacy" or not encoder.masked_subsampling:
        found.append("what NeMo before 2.5 computed there (convert --modern_front_end replaces it)")
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


def config(model, size, pad):
    """config.json of a NemoModel with `size` pieces; transformers' words first, then ours for what
    it has no words for."""
    settings = model.config
    encoder = FastConformerConfig(**settings["encoder"])
    theirs = {key: getattr(encoder, name) for key, (name, _) in _ENCODER.items()}
    theirs |= {
        "model_type": "parakeet_encoder",
        "subsampling_conv_channels": encoder.conv_channels,
        "convolution_bias": encoder.use_bias,
        "intermediate_size": encoder.d_model * encoder.ff_expansion_factor,
        "hidden_act": "silu",
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
    }
    loss = dict(settings["loss"])
    if model.kind == "ctc":
        head = {"ctc_loss_reduction": "mean" if loss["reduction"] == "mean" else "sum"}
        head["ctc_zero_infinity"] = True
    else:
        head = {
            "blank_token_id": size,
            "decoder_hidden_size": settings["decoder"]["pred_hidden"],
            "num_decoder_layers": settings["decoder"]["pred_rnn_layers"],
            "hidden_act": settings["joint"]["activation"],
            "max_symbols_per_step": settings["decoding"]["max_symbols"] or 10,
            "is_encoder_decoder": True,
        }
        if model.kind == "tdt":
            head["durations"] = list(loss.pop("durations"))
    said = {*(name for name, _ in _ENCODER.values()), *_FIXED, "ff_expansion_factor"}
    ours = {
        "front_end": {"dither": settings["front_end"]["dither"]},
        "encoder": _unsaid(encoder, said),
        "loss": loss,
    }
    if model.kind != "ctc":
        ours["decoder"] = _unsaid(PredictionConfig(**settings["decoder"]), _SAID)
        ours["joint"] = _unsaid(JointConfig(**settings["joint"]), _SAID)
        ours["decoding"] = dict(settings["decoding"])
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


def generation(model, size, pad):
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


def processor(model):
    """processor_config.json."""
    front_end = dict(model.config["front_end"])
    front_end["n_fft"] = front_end["n_fft"] or 1 << (front_end["win"] - 1).bit_length()
    return {
        "processor_class": "ParakeetProcessor",
        "blank_token": "<blank>",
        "decoder_type": model.kind,
        "feature_extractor": {
            "feature_extractor_type": "ParakeetFeatureExtractor",
            **{key: front_end[name] for key, (name, _) in _EXTRACTOR.items()},
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
        },
    }
