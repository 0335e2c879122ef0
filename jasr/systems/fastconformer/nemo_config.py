"""NeMo's model configs as our settings, and back.

A model's settings are plain dicts by section: front_end (features.FrontEndConfig), encoder
(FastConformerConfig), decoder and joint of a transducer, loss, decoding. A NeMo config has the same
facts under its own names, some of them several times.
"""

import copy
import typing
import warnings

from jasr.interop import plain_yaml
from jasr.interop.sections import MUST, UNSAID, Row, Table, complete, merge, read
from jasr.interop.sections import write as section_of
from jasr.models.fastconformer.nemo_sections import (
    MODULES,
    is_legacy,
    read_encoder,
    read_front_end,
    write_encoder,
    write_front_end,
)
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.systems.fastconformer.settings import DecodingConfig, LossConfig
from jasr.systems.fastconformer.transducer import JointConfig, PredictionConfig

MODELS = "nemo.collections.asr.models"
# The last part of `target`, by kind; the kinds share a class where the loss tells them apart.
TARGETS = {
    "ctc": f"{MODELS}.ctc_bpe_models.EncDecCTCModelBPE",
    "rnnt": f"{MODELS}.rnnt_bpe_models.EncDecRNNTBPEModel",
    "tdt": f"{MODELS}.rnnt_bpe_models.EncDecRNNTBPEModel",
    "hybrid": f"{MODELS}.hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel",
    "encoder": f"{MODELS}.aed_multitask_models.EncDecMultiTaskModel",  # of Canary
}
READ = (
    "preprocessor encoder decoder joint loss decoding aux_ctc tokenizer ctc_reduction "
    "rnnt_reduction target nemo_version"
).split()
VERSION = "2.5.0"  # of the NeMo whose behaviour kind "nemo" and masked_subsampling are
GREEDY = ("greedy_batch", "greedy")
# NeMo's beam searches of transducers; the one here is nearest to the last.
BEAMS = ("beam", "tsd", "alsd", "malsd_batch", "maes_batch", "maes")


class ConfigError(ValueError):
    """A NeMo config that does not describe a model known here."""


class Settings(typing.NamedTuple):
    """A model's kind ("ctc", "rnnt", "tdt", "hybrid" or "encoder") and sections of settings."""

    kind: str
    sections: dict


# ---- the tables ----------------------------------------------------------------------------------

CTC_DECODER = Table("decoder", None, (), f"{MODULES}.ConvASRDecoder", is_open=True)
_NO_PROJECTION = dict.fromkeys((None, -1, 0), UNSAID)
_PREDNET = "forget_gate_bias hidden_hidden_bias_scale weights_init_scale t_max".split()
PREDICTION = Table(
    "decoder",
    PredictionConfig,
    (
        Row("vocab_size", usual=MUST),
        Row("blank_as_pad"),
        Row("random_state_sampling"),
        Row("prednet.pred_hidden", usual=640),
        Row("prednet.pred_rnn_layers"),
        Row("prednet.dropout", read={None: 0.0}),
        *(Row(f"prednet.{name}") for name in _PREDNET),
        Row("prednet.rnn_hidden_size", "pred_hidden", UNSAID, _NO_PROJECTION, write=None),
    ),
    target=f"{MODULES}.RNNTDecoder",
    always={"normalization_mode": None},
    silent=("vocabulary",),
)
JOINT = Table(
    "joint",
    JointConfig,
    (
        Row("num_classes", usual=MUST),
        Row("num_extra_outputs", usual=0, read={None: 0}),
        *(Row(f"jointnet.{name}_hidden", usual=MUST) for name in ("encoder", "pred", "joint")),
        Row("jointnet.activation", read=lambda name, _: name.lower()),
        Row("jointnet.dropout", read={None: 0.0}),
    ),
    target=f"{MODULES}.RNNTJoint",
    only_as={"masking_prob": (None, -1, 0)},
    # They choose how much is computed at once, or normalise what every reader normalises.
    also={"log_softmax": None, "preserve_memory": False}
    | {"fuse_loss_wer": False, "fused_batch_size": -1},
    silent=("vocabulary", "experimental_fuse_loss_wer"),
)

USUAL_LOSS = "warprnnt_numba"  # what NeMo takes for "default", and whose numbers it reads
# (our kind, the numbers that are read from <name>_kwargs) of NeMo's implementations.
LOSSES = {
    "warprnnt_numba": ("rnnt", ("fastemit_lambda", "clamp")),
    "rnnt": ("rnnt", ("fastemit_lambda", "clamp")),
    "warprnnt": ("rnnt", ()),
    "pytorch": ("rnnt", ()),
    "tdt": ("tdt", ("fastemit_lambda", "clamp", "sigma", "omega")),
    "tdt_pytorch": ("tdt", ("sigma",)),
}
NUMBERS = {"fastemit_lambda": 0.0, "clamp": -1.0, "sigma": 0.0, "omega": 0.0}  # NeMo's defaults
LONGEST = 1000  # frames of a duration
_OPEN = Table("", LossConfig, (), is_open=True, none_is_usual=True)
LOSS_NAME = _OPEN._replace(
    rows=(Row("loss.loss_name", "name", "default", rules={"choices": ("default", *LOSSES)}),)
)
CTC_LOSS = _OPEN._replace(rows=(Row("ctc_reduction", "reduction", "mean_batch"),))
_WEIGHT = Row("aux_ctc.ctc_loss_weight", "ctc_weight", 0.5)
AUXILIARY = (_WEIGHT, Row("aux_ctc.ctc_reduction", usual="mean_batch"))


def durations(listed, _=None):
    """Frames that a TDT's outputs stand for. ValueError: not a list of them."""
    frames = listed if isinstance(listed, list | tuple) else ()
    numbers = all(type(n) is int and 0 <= n <= LONGEST for n in frames)
    if not numbers or len(set(frames)) < len(frames) or not any(frames):
        raise ValueError(f"not a list of frames up to {LONGEST}, each once, one above 0")
    return listed


def numbers(kind):
    """NeMo's defaults of the numbers that a loss of this kind has."""
    return {n: NUMBERS[n] for n in NUMBERS if kind == "tdt" or n in ("fastemit_lambda", "clamp")}


def loss_table(name, aux=False):
    """Rows of a transducer's loss, NeMo's implementation `name` of it; of a hybrid's with aux."""
    kind, place = LOSSES[name][0], f"loss.{name}_kwargs"
    rows = [Row("rnnt_reduction", "reduction", "mean_batch")]
    rows += [Row(f"{place}.{name}", usual=usual) for name, usual in numbers(kind).items()]
    if kind == "tdt":
        keys = (f"{place}.durations", "decoding.durations")
        read, write = lambda both, _: durations(both[0] or both[1]), lambda both, _: (both, both)
        rows.append(Row(keys, "durations", (None, None), read, write))
    return _OPEN._replace(rows=(*rows, *(AUXILIARY if aux else ())))


def loss_fields(kind, loss):
    """The fields of LossConfig that a model of this kind has in NeMo, whose loss is `loss`."""
    table = loss_table("tdt" if loss == "tdt" else USUAL_LOSS, kind == "hybrid")
    return ["kind", *(row.field for row in (CTC_LOSS if kind == "ctc" else table).rows)]


def _most_symbols(both, _):
    """NeMo looks at max_symbols_per_step where max_symbols is null, and without both it is 10."""
    said = [most for most in both if most is not UNSAID]
    return next((most for most in said if most), 0) if said else 10


_SYMBOLS = tuple(f"decoding.greedy.{name}" for name in ("max_symbols", "max_symbols_per_step"))
_UNLIMITED = lambda most, _: (most or None,) * 2  # noqa: E731
ANY = {"choices": None}  # NeMo has other strategies than ours
DECODING = _OPEN._replace(
    cls=DecodingConfig,
    rows=(
        Row("decoding.strategy", "strategy", "greedy_batch", {"": "greedy_batch"}, rules=ANY),
        Row(_SYMBOLS, "max_symbols", (UNSAID, UNSAID), _most_symbols, _UNLIMITED),
    ),
)
BEAM = DECODING._replace(
    rows=(
        Row("decoding.beam.beam_size", "beam", 4),
        Row("decoding.beam.maes_expansion_gamma", "expansion_gamma", 2.3),
        Row("decoding.beam.score_norm", "length_normalised", True),
    )
)


# ---- reading -------------------------------------------------------------------------------------


def parse(config, head=None):
    """(Settings, the resolved sections of the NeMo config that were read).

    Args:
      config: the plain dict of model_config.yaml, or of a recipe with it under "model".
      head: the number of outputs in the weights, which decides the size of the vocabulary; without
        it the config must say it.

    Raises:
      ConfigError: lists what is unknown, missing or contradictory in any section.
      plain_yaml.YamlError: references that lead nowhere.
    """
    if not isinstance(config, dict):
        raise ConfigError(f"the config is a {type(config).__name__}, not a mapping")
    if "encoder" not in config and isinstance(config.get("model"), dict):
        config = config["model"]
    nemo = plain_yaml.resolve(config, READ)
    name = str(nemo.get("target") or "nothing").rpartition(".")[2]
    kinds = [kind for kind, target in TARGETS.items() if target.endswith(f".{name}")]
    if not kinds:
        known = sorted({target.rpartition(".")[2] for target in TARGETS.values()})
        raise ConfigError(f"the config's target is {name}; known are {', '.join(known)}")
    kind, legacy, problems = kinds[0], is_legacy(nemo.get("nemo_version")), []
    encoder = read_encoder(nemo.get("encoder"), legacy, problems)
    front_end = read_front_end(nemo.get("preprocessor"), legacy, problems)
    sections = {"front_end": front_end, "encoder": encoder}
    if kind == "ctc":
        read(CTC_DECODER, nemo.get("decoder"), problems)
        sections["loss"] = {"kind": "ctc", **(read(CTC_LOSS, nemo, problems) or {})}
    elif kind != "encoder":
        width = FastConformerConfig(**encoder).out_dim if encoder else 1
        loss = read_loss(nemo, kind == "hybrid", problems)
        sections |= _networks(nemo, head, width, loss, problems)
        sections |= {"loss": loss, "decoding": _decoding(nemo, problems)}
        kind = loss["kind"] if loss and kind != "hybrid" else kind
    if problems:
        raise ConfigError("; ".join(dict.fromkeys(problems)))
    return Settings(kind, sections), nemo


def read_loss(nemo, hybrid, problems):
    """The loss of RNN-T or TDT, and of a hybrid's CTC branch; None with `problems`."""
    if hybrid:
        aux = nemo.get("aux_ctc")
        theirs = aux.get("decoder") if isinstance(aux, dict) else aux
        read(CTC_DECODER._replace(name="aux_ctc.decoder"), theirs, problems)
    name = (read(LOSS_NAME, nemo, problems) or {}).get("name")
    if name is None:
        return None
    name = USUAL_LOSS if name == "default" else name
    kind, used = LOSSES[name]
    values = read(loss_table(name, hybrid), nemo, problems)
    for number in (n for n in NUMBERS if n not in used and n in (values or {})):
        if values[number] != NUMBERS[number]:
            note = f"loss.{name}_kwargs.{number} of the file is not used: NeMo's {name} does not"
            warnings.warn(f"{note} read it", stacklevel=2)
            values[number] = NUMBERS[number]
    loss = values and {"kind": kind, **values}
    return loss if complete(LossConfig, loss, "loss", problems) else None


def _networks(nemo, head, width, loss, problems):
    """{"decoder", "joint"}: sizes that recipes leave out follow from the encoder and the head."""
    extra = len((loss or {}).get("durations", ()))
    decoder, joint = nemo.get("decoder"), nemo.get("joint")
    if head is not None and isinstance(decoder, dict) and isinstance(joint, dict):
        size = max(1, head - 1 - extra)
        decoder, joint = {**decoder, "vocab_size": size}, {**joint, "num_classes": size}
    said = read(PREDICTION, decoder, problems)
    prediction = complete(PredictionConfig, said, "decoder", problems)
    if isinstance(joint, dict):
        hidden = prediction["pred_hidden"] if prediction else 1
        joint = merge({"jointnet": {"encoder_hidden": width, "pred_hidden": hidden}}, joint)
    joint = complete(JointConfig, read(JOINT, joint, problems), "joint", problems)
    if joint and loss and joint["num_extra_outputs"] != extra:
        problems.append(
            f"joint.num_extra_outputs is {joint['num_extra_outputs']}, but the loss "
            f"{loss['kind']} has {extra} durations"
        )
    return {"decoder": prediction, "joint": joint}


def _decoding(nemo, problems):
    """The decoding section: NeMo's strategy, and of a beam search its numbers."""
    found = read(DECODING, nemo, problems)
    beam = read(BEAM, nemo, problems) if found and found["strategy"] not in GREEDY else None
    return found and {**found, **(beam or {})}


# ---- writing -------------------------------------------------------------------------------------


def write(model, pieces, base=None):
    """A NeMo config of Settings, from which NeMo builds the model.

    Args:
      model: Settings of kind "ctc", "rnnt", "tdt" or "hybrid".
      pieces: the tokenizer's pieces by id.
      base: the NeMo config that the model was read from: what has no meaning here stays as it is.

    Raises:
      ConfigError: a kind or setting that NeMo does not have.
    """
    kind, sections = model
    if kind not in ("ctc", "rnnt", "tdt", "hybrid"):
        raise ConfigError(f"a model of kind {kind!r} is not written")
    front_end, encoder = sections["front_end"], sections["encoder"]
    legacy = not encoder["masked_subsampling"]
    if (front_end["kind"] == "nemo_legacy") != legacy:
        raise ConfigError(
            "NeMo's versions have both front_end.kind 'nemo' and masked_subsampling (2.5 and "
            "later), or neither"
        )
    name = TARGETS[kind].rpartition(".")[2]
    base = base if base and str(base.get("target")).endswith(f".{name}") else {}
    base, version = copy.deepcopy(base), base.get("nemo_version")
    if version is None or is_legacy(version) != legacy:
        version = "2.4.0" if legacy else VERSION
    new = {
        "sample_rate": front_end["sample_rate"],
        "preprocessor": write_front_end(front_end),
        "encoder": write_encoder(encoder),
    }
    head = section_of(CTC_DECODER, {}) | {
        "feat_in": FastConformerConfig(**encoder).out_dim,
        "num_classes": len(pieces),
        "vocabulary": list(pieces),
    }
    if kind == "ctc":
        strategy = sections.get("decoding", {}).get("strategy", "greedy_batch")
        new = section_of(CTC_LOSS, sections["loss"], new)
        new |= {"decoder": head, "decoding": {"strategy": strategy}}
    else:
        new |= _transducer_sections(sections, pieces, base)
    if kind == "hybrid":
        rest = {} if "aux_ctc" in base else {"use_cer": False, "decoding": {"strategy": "greedy"}}
        new["aux_ctc"] |= {"decoder": head, **rest}
    new |= {"labels": list(pieces)} if "labels" in base else {}
    target = base.get("target", TARGETS[kind])
    return {**merge(base, new), "target": target, "nemo_version": version}


def _transducer_sections(sections, pieces, base):
    decoder, joint, loss = sections["decoder"], sections["joint"], sections["loss"]
    if {decoder["vocab_size"], joint["num_classes"]} != {len(pieces)}:
        raise ConfigError(
            f"{len(pieces)} pieces for decoder.vocab_size {decoder['vocab_size']} and "
            f"joint.num_classes {joint['num_classes']}"
        )
    how, was = dict(sections["decoding"]), base.get("decoding") or {}
    # from which NeMo's constructors fill in the joint network's sizes
    sizes = {"enc_hidden": joint["encoder_hidden"]}
    sizes |= {name: joint[name] for name in ("pred_hidden", "joint_hidden")}
    new = {
        "model_defaults": sizes,
        "decoder": section_of(PREDICTION, decoder),
        "joint": section_of(JOINT, joint, base.get("joint")) | {"vocabulary": list(pieces)},
    }
    if how["strategy"] not in GREEDY:
        how["strategy"] = was["strategy"] if was.get("strategy") in BEAMS else "maes"
        new = section_of(BEAM, how, new)
    new = section_of(DECODING, how, new)
    if "max_symbols_per_step" not in (was.get("greedy") or {}):
        del new["decoding"]["greedy"]["max_symbols_per_step"]
    name = "tdt" if loss["kind"] == "tdt" else USUAL_LOSS
    new = section_of(loss_table(name, "ctc_weight" in loss), loss, new)
    new["loss"]["loss_name"] = name
    if name == "tdt":
        new["decoding"]["model_type"] = "tdt"
    return new
