"""NeMo's model configs as our settings, and back.

A model's settings are plain dicts by section: front_end (features.FrontEndConfig), encoder
(FastConformerConfig), decoder and joint of a transducer, loss, decoding. A NeMo config has the same
facts under its own names, some of them several times.
"""

import copy
import dataclasses
import typing

from jasr import settings
from jasr.interop import plain_yaml
from jasr.models.fastconformer import nemo_front_end
from jasr.models.fastconformer.nemo_front_end import is_legacy
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.systems.fastconformer import nemo_loss
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
MODULES = "nemo.collections.asr.modules"


class ConfigError(ValueError):
    """A NeMo config that does not describe a model known here."""


class Settings(typing.NamedTuple):
    """A model's kind ("ctc", "rnnt", "tdt", "hybrid" or "encoder") and sections of settings."""

    kind: str
    sections: dict


def parse(config, head=None):
    """(Settings, the resolved sections of the NeMo config that were read).

    Args:
      config: the plain dict of model_config.yaml, or of a recipe with it under "model".
      head: the number of outputs in the weights, which decides the size of the vocabulary; without
        it the config must say it.

    Raises:
      ConfigError: lists what is unknown, missing or contradictory in any section.
      nemo_yaml.YamlError: references that lead nowhere.
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
    problems = _Problems()
    legacy = is_legacy(nemo.get("nemo_version"))
    sections = {
        "front_end": problems.of(_front_end, nemo, "preprocessor", legacy),
        "encoder": problems.of(_encoder, nemo, "encoder", legacy),
    }
    kind = kinds[0]
    if kind == "ctc":
        sections["loss"] = problems.of(_ctc_loss, nemo, "decoder")
    elif kind != "encoder":
        encoder = sections["encoder"]
        width = FastConformerConfig(**encoder).out_dim if encoder else 1
        sections |= problems.of(_transducer, nemo, "joint", head, width) or {}
        loss = sections.get("loss", {})
        if kind == "hybrid":
            sections["loss"] = {**loss, **(problems.of(_auxiliary, nemo, "aux_ctc") or {})}
        elif loss:
            kind = loss["kind"]
    problems += _too_large(sections)
    if problems:
        raise ConfigError("; ".join(problems))
    return Settings(kind, sections), nemo


# A config must not be able to keep the reader busy with sizes that no model has.
_MOST = {"n_layers": 500, "pred_rnn_layers": 50, "conv_kernel_size": 1001, "subsampling_factor": 64}


def _too_large(sections):
    return [
        f"{section}.{name} is {value}"
        for section, values in sections.items()
        for name, value in (values or {}).items()
        if isinstance(value, int) and abs(value) > _MOST.get(name, 1 << 20)
    ]


class _Problems(list):
    """What several readers of sections found wrong."""

    def of(self, read, nemo, name, *args):
        """What `read` makes of a section; None, and the reason kept, if it raises."""
        try:
            return read(nemo, name, *args)
        except KeyError as e:
            self.append(f"{name}.{e.args[0]} is missing")
        except (TypeError, AttributeError, OverflowError) as e:  # values of another type
            self.append(f"{name}: {e}")
        except ValueError as e:
            self.append(str(e))
        return None


def _section(nemo, name):
    section = nemo.get(name)
    if not isinstance(section, dict):
        raise ConfigError(f"the config has no section {name!r}")
    return section


def _check_target(nemo, section, name):
    target = _section(nemo, section).get("_target_") or name
    if str(target).rpartition(".")[2] != name:
        raise ConfigError(f"{section}._target_ is {target}; known is {name}")


def _front_end(nemo, name, legacy):
    return nemo_front_end.read(_section(nemo, name), legacy)


def _encoder(nemo, name, legacy):
    version = "2.4" if legacy else VERSION
    return _checked(name, FastConformerConfig.from_nemo(_section(nemo, name), version))


def _checked(name, config):
    """The fields of a settings dataclass as a dict, of the types that they are said to have."""
    values = settings.to_dict(config)
    wrong = [
        f"{name}.{field.name} is {values[field.name]!r}"
        for field in dataclasses.fields(config)
        if not _is_a(values[field.name], field.type)
    ]
    if wrong:
        raise ConfigError(", ".join(wrong))
    return values


def _is_a(value, kind):
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.5, kind))


def _ctc_loss(nemo, name):
    _check_target(nemo, name, "ConvASRDecoder")
    return {"kind": "ctc", "reduction": nemo_loss.reduction(nemo, "ctc_reduction")}


# ---- transducers ---------------------------------------------------------------------------------


def _transducer(nemo, _, head, encoder_hidden):
    """Sections decoder, joint, loss and decoding of RNN-T and TDT."""
    decoder, joint = _section(nemo, "decoder"), _section(nemo, "joint")
    loss = nemo_loss.read(nemo)
    extra = joint.get("num_extra_outputs") or 0
    if extra != len(loss.get("durations", ())):
        raise ConfigError(
            f"joint.num_extra_outputs is {extra}, but the loss {loss['kind']} has "
            f"{len(loss.get('durations', ()))} durations"
        )
    if head is not None:  # NeMo takes the numbers that recipes leave out from elsewhere, too
        size = max(1, head - 1 - extra)
        decoder, joint = {**decoder, "vocab_size": size}, {**joint, "num_classes": size}
    prediction = PredictionConfig.from_nemo(decoder)
    hidden = {"encoder_hidden": encoder_hidden, "pred_hidden": prediction.pred_hidden}
    joint = {**joint, "jointnet": {**hidden, **(joint.get("jointnet") or {})}}
    return {
        "decoder": _checked("decoder", prediction),
        "joint": _checked("joint", JointConfig.from_nemo(joint)),
        "loss": loss,
        "decoding": _decoding(nemo.get("decoding") or {}),
    }


GREEDY = ("greedy_batch", "greedy")
# NeMo's beam searches of transducers; the one here is nearest to the last.
BEAMS = ("beam", "tsd", "alsd", "malsd_batch", "maes_batch", "maes")


def _decoding(nemo):
    """The decoding section: NeMo's strategy, and of a beam search its numbers."""
    greedy, beam = nemo.get("greedy") or {}, nemo.get("beam") or {}
    strategy = nemo.get("strategy") or "greedy_batch"
    most = 10
    if "max_symbols" in greedy or "max_symbols_per_step" in greedy:  # None, or 0: no limit
        most = greedy.get("max_symbols") or greedy.get("max_symbols_per_step") or None
    if most is not None and (type(most) is not int or most < 1):
        raise ConfigError(f"decoding.greedy.max_symbols is {most!r}")
    found = {"strategy": strategy, "max_symbols": most}
    if strategy not in GREEDY:
        found |= {
            "beam": beam.get("beam_size", 4),
            "expansion_gamma": beam.get("maes_expansion_gamma", 2.3),
            "length_normalised": beam.get("score_norm", True),
        }
    return found


def _auxiliary(nemo, name):
    """What a hybrid's loss has of its CTC branch."""
    aux = _section(nemo, name)
    _check_target(aux, "decoder", "ConvASRDecoder")
    return {
        "ctc_weight": aux.get("ctc_loss_weight", 0.5),
        "ctc_reduction": nemo_loss.reduction(aux, "ctc_reduction"),
    }


# ---- back ----------------------------------------------------------------------------------------


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
    front_end, encoder = sections["front_end"], FastConformerConfig(**sections["encoder"])
    if (front_end["kind"] == "nemo_legacy") == encoder.masked_subsampling:
        raise ConfigError(
            "NeMo's versions have both front_end.kind 'nemo' and masked_subsampling (2.5 and "
            "later), or neither"
        )
    legacy = not encoder.masked_subsampling
    name = TARGETS[kind].rpartition(".")[2]
    is_same = base is not None and str(base.get("target")).endswith(f".{name}")
    base = copy.deepcopy(base) if is_same else {}
    version = base.get("nemo_version")
    if version is None or is_legacy(version) != legacy:
        version = "2.4.0" if legacy else VERSION
    new = {
        "sample_rate": front_end["sample_rate"],
        "preprocessor": nemo_front_end.write(front_end),
        "encoder": encoder.to_nemo(),
    }
    if kind == "ctc":
        new |= _ctc(sections, pieces)
    else:
        new |= _transducer_sections(sections, pieces, base)
    if kind == "hybrid":
        loss = sections["loss"]
        new["aux_ctc"] = {
            "ctc_loss_weight": loss["ctc_weight"],
            "ctc_reduction": loss["ctc_reduction"],
            "decoder": _ctc_decoder(encoder.out_dim, pieces),
            **({} if "aux_ctc" in base else {"use_cer": False, "decoding": {"strategy": "greedy"}}),
        }
    if "labels" in base:
        new["labels"] = list(pieces)
    target = base.pop("target", TARGETS[kind])
    base.pop("nemo_version", None)
    return {**_merge(base, new), "target": target, "nemo_version": version}


def _merge(base, new):
    """`new` over `base`, section by section."""
    result = dict(base)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = _merge(base[key], value) if both else value
    return result


def _ctc(sections, pieces):
    encoder = FastConformerConfig(**sections["encoder"])
    return {
        "ctc_reduction": sections["loss"]["reduction"],
        "decoder": _ctc_decoder(encoder.out_dim, pieces),
        "decoding": {"strategy": sections.get("decoding", {}).get("strategy", "greedy_batch")},
    }


def _ctc_decoder(features, pieces):
    return {
        "_target_": f"{MODULES}.ConvASRDecoder",
        "feat_in": features,
        "num_classes": len(pieces),
        "vocabulary": list(pieces),
    }


def _transducer_sections(sections, pieces, base):
    decoder = PredictionConfig(**sections["decoder"])
    joint, loss = JointConfig(**sections["joint"]), sections["loss"]
    if {decoder.vocab_size, joint.num_classes} != {len(pieces)}:
        raise ConfigError(
            f"{len(pieces)} pieces for decoder.vocab_size {decoder.vocab_size} and "
            f"joint.num_classes {joint.num_classes}"
        )
    network = joint.to_nemo()
    for key in ("log_softmax", "preserve_memory", "fuse_loss_wer", "fused_batch_size"):
        if key in (base.get("joint") or {}):  # how NeMo computes, not what
            del network[key]
    durations = {}
    if loss["kind"] == "tdt":
        durations = {"model_type": "tdt", "durations": list(loss["durations"])}
    how, was = sections["decoding"], (base.get("decoding") or {}).get("strategy")
    beam = {}
    if how["strategy"] not in GREEDY:
        beam = {
            "strategy": was if was in BEAMS else "maes",
            "beam": {
                "beam_size": how["beam"],
                "maes_expansion_gamma": how["expansion_gamma"],
                "score_norm": how["length_normalised"],
            },
        }
    return {
        "model_defaults": {  # from which NeMo's constructors fill in the joint network's sizes
            "enc_hidden": joint.encoder_hidden,
            "pred_hidden": joint.pred_hidden,
            "joint_hidden": joint.joint_hidden,
        },
        "rnnt_reduction": loss["reduction"],
        "decoder": decoder.to_nemo(),
        "joint": {**network, "vocabulary": list(pieces)},
        "decoding": {
            "strategy": how["strategy"],
            "greedy": _greedy(how, base),
            **beam,
            **durations,
        },
        "loss": nemo_loss.write(loss),
    }


def _greedy(how, base):
    """decoding.greedy; NeMo looks at max_symbols_per_step where max_symbols is None."""
    names = ["max_symbols"]
    if "max_symbols_per_step" in ((base.get("decoding") or {}).get("greedy") or {}):
        names.append("max_symbols_per_step")
    return dict.fromkeys(names, how["max_symbols"])
