"""config.json and the feature extractor of transformers' Parakeet (5.x) as our settings, and back.

transformers takes any key and ignores those that it does not know; here a key that is neither read
nor known to change nothing is refused with its value, as in NeMo's configs. What transformers has
no words for stands under "jasr". transformers itself is not needed.
"""

import dataclasses
import functools

from jasr import tree
from jasr.audio.features import FrontEndConfig
from jasr.interop import sections
from jasr.interop.sections import MUST, UNSAID, Row, Table
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.settings import to_dict
from jasr.systems.fastconformer.nemo_config import ANY, BEAM, durations, numbers
from jasr.systems.fastconformer.settings import DecodingConfig, LossConfig
from jasr.systems.fastconformer.transducer import JointConfig, PredictionConfig

CLASSES = {"ctc": "ParakeetForCTC", "rnnt": "ParakeetForRNNT", "tdt": "ParakeetForTDT"}
SECTIONS = {
    "front_end": FrontEndConfig,
    "encoder": FastConformerConfig,
    "decoder": PredictionConfig,
    "joint": JointConfig,
    "loss": LossConfig,
    "decoding": DecodingConfig,
}
# What transformers' encoder always is.
FIXED = {
    "feat_out": -1,
    "subsampling": "dw_striding",
    "causal_downsampling": False,
    "self_attention_model": "rel_pos",
    "att_context_style": "regular",
    "conv_norm_type": "batch_norm",
    "conv_context_size": None,
    "masked_subsampling": True,
}
# The key that holds the blank, and transformers' default for it.
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


# ---- the tables ----------------------------------------------------------------------------------

EXTRACTOR = Table(
    "feature_extractor",
    FrontEndConfig,
    (
        Row("feature_size", "n_mels", 80),
        Row("sampling_rate", "sample_rate", 16000),
        Row("hop_length", "hop", 160),
        Row("win_length", "win", 400),
        Row("n_fft", usual=512,
            write=lambda size, values: size or 1 << (values["win"] - 1).bit_length()),
        Row("preemphasis", "preemph", 0.97, read={None: 0.0}),
    ),
    always={
        "feature_extractor_type": "ParakeetFeatureExtractor",
        "padding_side": "right",
        "padding_value": 0.0,
    },
    only_as={"do_normalize": (True,)},
    also={"return_attention_mask": True},
    silent=HARMLESS,
)  # fmt: skip


def _expansion(inner, values):
    factor, rest = divmod(inner, values["encoder.d_model"])
    if rest:
        raise ValueError(f"no multiple of hidden_size {values['encoder.d_model']}")
    return factor


def _encoder(key, field, usual=UNSAID, *args, **more):
    return Row(f"encoder_config.{key}", f"encoder.{field}", usual, *args, **more)


ENCODER = (
    _encoder("num_mel_bins", "feat_in", 80),
    _encoder("num_hidden_layers", "n_layers", 24),
    _encoder("hidden_size", "d_model", 1024),
    _encoder("num_attention_heads", "n_heads", 8),
    _encoder("num_key_value_heads", "n_heads", write=None),
    _encoder("subsampling_factor", "subsampling_factor", 8),
    _encoder("subsampling_conv_channels", "subsampling_conv_channels", 256, rules={"least": 1},
             write=lambda given, values: values["encoder.d_model"] if given == -1 else given),
    _encoder("conv_kernel_size", "conv_kernel_size", 9),
    _encoder("attention_bias", "use_bias", True),
    _encoder("convolution_bias", "use_bias"),
    _encoder("scale_input", "xscaling", True),
    _encoder("dropout", "dropout_pre_encoder", 0.1),
    _encoder("activation_dropout", "dropout", 0.1),
    _encoder("attention_dropout", "dropout_att", 0.1),
    _encoder("dropout_positions", "dropout_emb", 0.0),
    _encoder("layerdrop", "stochastic_depth_drop_prob", 0.1),
    _encoder("intermediate_size", "ff_expansion_factor", 4096, _expansion,
             lambda factor, values: factor * values["encoder.d_model"]),
)  # fmt: skip
_ALWAYS = {
    "encoder_config.model_type": "parakeet_encoder",
    "encoder_config.hidden_act": "silu",
    "encoder_config.subsampling_conv_kernel_size": 3,
    "encoder_config.subsampling_conv_stride": 2,
}
TRANSDUCER = (
    Row("vocab_size", "joint.num_classes", MUST, lambda n, _: n - 1, None),
    Row("decoder_hidden_size", "decoder.pred_hidden", 640),
    Row("decoder_hidden_size", "joint.pred_hidden", 640, write=None),
    Row("decoder_hidden_size", "joint.joint_hidden", 640, write=None),
    Row("num_decoder_layers", "decoder.pred_rnn_layers", 2),
    Row("hidden_act", "joint.activation", "relu"),
)
SYMBOLS = Row("max_symbols_per_step", "decoding.max_symbols", 10, rules={"least": 1},
              write=lambda most, _: most or 10)  # fmt: skip
DURATIONS = Row("durations", "loss.durations", [0, 1, 2, 3, 4], durations)


def _ours(section, name, *args, **more):
    """A row of the "jasr" section."""
    return Row(f"jasr.{section}.{name}", f"{section}.{name}", *args, **more)


def _unsaid(section, said):
    """Rows of the fields that transformers has no words for, written where they are not usual."""
    usual = {f.name: f.default for f in dataclasses.fields(SECTIONS[section])}
    unless = lambda name: lambda v, _: UNSAID if v == usual[name] else v  # noqa: E731
    return tuple(_ours(section, n, write=unless(n)) for n in usual if f"{section}.{n}" not in said)


@functools.cache
def table(kind):
    """The rows of config.json of a kind of CLASSES."""
    said = {row.field for row in (*ENCODER, *TRANSDUCER)} | {f"encoder.{name}" for name in FIXED}
    said |= {"decoder.vocab_size", "joint.encoder_hidden", "joint.num_extra_outputs"}
    front_end = [
        _ours("front_end", f.name, write={} if f.name == "dither" else None)
        for f in dataclasses.fields(FrontEndConfig)
        if f.name not in {row.field for row in EXTRACTOR.rows}
    ]
    also, theirs = {"architectures": [CLASSES[kind]], "dtype": "float32"}, f"parakeet_{kind}"
    rows = [
        Row("model_type", "loss.kind", MUST, {theirs: kind}, {kind: theirs}),
        _ours("loss", "kind"),
        *ENCODER,
        *front_end,
        *_unsaid("encoder", said),
    ]
    if kind == "ctc":
        mean = lambda reduction, _: "mean" if reduction == "mean" else "sum"  # noqa: E731
        rows += [
            Row("vocab_size", "size", 0, write=None),
            Row("ctc_loss_reduction", "loss.reduction", "mean", write=mean),
            Row("ctc_zero_infinity", "zero", True, write=None),
            _ours("loss", "reduction", wins=True),
        ]
        also |= {"ctc_zero_infinity": True}
    else:
        rows += [
            *TRANSDUCER,
            _ours("loss", "reduction", "mean_batch"),
            *(_ours("loss", name, usual) for name, usual in numbers(kind).items()),
            *_unsaid("decoder", said),
            *_unsaid("joint", said),
            _ours("decoding", "strategy", "greedy_batch", rules=ANY),
            SYMBOLS,
            _ours("decoding", "max_symbols", read={None: 0}, wins=True),
            *(_ours("decoding", row.field) for row in BEAM.rows),
            *([DURATIONS] if kind == "tdt" else []),
        ]
        also |= {"is_encoder_decoder": True}
    silent = HARMLESS | {_BLANK[kind][0]}
    return Table("", SECTIONS, tuple(rows), always=_ALWAYS, silent=silent, also=also)


class HfError(ValueError):
    """A directory that is no Parakeet of transformers, or a model that transformers lacks."""


# ---- reading -------------------------------------------------------------------------------------


def read(config, extractor):
    """(kind, sections of settings, number of pieces) of config.json and the feature extractor.

    What is not given has transformers' defaults.

    Raises:
      HfError: lists values of another type and keys that are not known here.
    """
    kind = str(config.get("model_type")).removeprefix("parakeet_")
    if kind not in CLASSES:
        raise HfError(f"model_type {config.get('model_type')!r} is not a Parakeet with a head")
    problems = []
    found = sections.read(table(kind), config, problems)
    front_end = sections.read(EXTRACTOR, extractor, problems)
    problems += _blank(kind, config)
    if not isinstance(config.get("encoder_config"), dict):
        problems.append(f"encoder_config is {config.get('encoder_config')!r:.100}, not a mapping")
    if problems:
        unknown = any(problem.endswith("not known here") for problem in problems)
        hint = ". Take out of the file what changes nothing" * unknown
        raise HfError("; ".join(problems) + hint)
    given = {name: {} for name in SECTIONS}
    for field, value in found.items():
        section, _, name = field.rpartition(".")
        given.setdefault(section, {})[name] = value
    size, loss = config["vocab_size"] - 1, given["loss"]
    given["front_end"] = {**front_end, **given["front_end"]}
    given["encoder"] |= FIXED
    given["decoder"]["vocab_size"] = size
    given["joint"] |= {
        "encoder_hidden": given["encoder"]["d_model"],
        "num_extra_outputs": len(loss.get("durations", ())),
    }
    names = ["front_end", "encoder"] + ["decoder", "joint"] * (kind != "ctc")
    made = {n: sections.complete(SECTIONS[n], given[n], n, problems) for n in names}
    sections.complete(LossConfig, loss, "loss", problems)
    if problems:
        raise HfError("; ".join(problems))
    plain = {name: given[name] for name in ("loss", "decoding") if given[name]}
    return kind, {**made, **plain}, size


def _blank(kind, config):
    """What is wrong with the key that holds the blank."""
    (key, usual), size = _BLANK[kind], config.get("vocab_size")
    if size is None:
        return ["config.json has no vocab_size"]
    if type(size) is not int or size < 2:
        return [f"vocab_size is {size!r:.100}, not an integer of at least 2"]
    if (blank := config.get(key, usual)) == size - 1:
        return []
    said = "" if key in config else " by default"
    wanted = f"the blank must be the last id, vocab_size - 1 = {size - 1}"
    return [f"{key} is {blank!r:.100}{said}: {wanted}"]


# ---- writing -------------------------------------------------------------------------------------


def foreign(model):
    """What of a model transformers' Parakeet cannot be, in words."""
    if model.kind == "hybrid":
        return ["the kind 'hybrid', of which convert --branch=transducer or --branch=ctc takes one"]
    if model.kind not in CLASSES:
        return [f"the kind {model.kind!r}"]
    config, found = model.config, []
    encoder, front_end = FastConformerConfig(**config["encoder"]), config["front_end"]
    for name, value in FIXED.items():
        if getattr(encoder, name) != value:
            found.append(f"encoder.{name} {getattr(encoder, name)!r}")
    if encoder.contexts[0] != (-1, -1):
        found.append(f"encoder.att_context_size {encoder.att_context_size}")
    if encoder.has_reduction:
        found.append("encoder.reduction")
    if encoder.feat_in % encoder.subsampling_factor:
        found.append(f"encoder.feat_in {encoder.feat_in}, no multiple of the subsampling")
    said = {row.field for row in EXTRACTOR.rows} | {"dither"}  # which is for training
    for name, usual in to_dict(FrontEndConfig()).items():
        if name not in said and front_end[name] != usual:
            found.append(f"front_end.{name} {front_end[name]!r}")
    if front_end["kind"] == "nemo_legacy" or not encoder.masked_subsampling:
        found.append("what NeMo before 2.5 computed there (convert --modern_front_end replaces it)")
    if model.kind != "ctc":
        hidden, joint = config["decoder"]["pred_hidden"], config["joint"]["joint_hidden"]
        if not config["decoder"]["blank_as_pad"]:
            found.append("decoder.blank_as_pad False")
        if hidden != joint:
            found.append(f"decoder.pred_hidden {hidden} other than joint.joint_hidden {joint}")
        listed = config["loss"].get("durations", ())
        if tuple(listed) != tuple(range(len(listed))):
            found.append(f"loss.durations {listed}, for it takes their places for them")
    return found


def files(model, size, pad):
    """{name: content} of the JSON files with the settings of a NemoModel with `size` pieces, whose
    padding has the id `pad`."""
    values = {path.replace("/", "."): value for path, value in tree.flatten(model.config).items()}
    ours = {"jasr": {section: {} for section in model.config}}  # where nothing is unsaid, too
    config = sections.write(table(model.kind), values, ours)
    config |= {"vocab_size": size + 1, "pad_token_id": pad}
    generation = {"pad_token_id": pad}
    if model.kind != "ctc":
        config["blank_token_id"] = generation["decoder_start_token_id"] = size
    if model.kind == "tdt":  # its durations stand behind the tokens among the logits
        last = size + len(model.config["loss"]["durations"])
        generation["suppress_tokens"] = list(range(size + 1, last + 1))
    processor = {
        "processor_class": "ParakeetProcessor",
        "blank_token": "<blank>",
        "decoder_type": model.kind,
        "feature_extractor": sections.write(EXTRACTOR, model.config["front_end"]),
    }
    return {
        "config.json": config,
        "generation_config.json": generation,
        "processor_config.json": processor,
    }
