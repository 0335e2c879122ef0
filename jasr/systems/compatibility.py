"""Which settings decide what weights mean, and how two configs differ in them.

Asked wherever weights meet a config that is not their own: at resume, at `config.init.path`, when
checkpoints are averaged. Tokenizers are compared beside it.
"""

import dataclasses

from jasr import settings
from jasr.audio.features import FrontEndConfig
from jasr.systems.fastconformer.model import ParakeetConfig
from jasr.systems.lact.settings import LactConfig

MODELS = {"ctc": LactConfig, "parakeet": ParakeetConfig}  # by task
# Settings outside of model and front end that weights were trained for, by task.
OTHERS = {"parakeet": {"loss.kind": "tdt", "loss.durations": (0, 1, 2, 3, 4)}}

# The others: weights that were trained with one value serve any other.
HARMLESS = frozenset(
    # training noise, first values, precision, memory
    "model.dropout model.audio_encoder_dropout front_end.dither model.initializer_range "
    "model.fw_init_gain model.dtype model.remat "
    # how the convolutions treat padding
    "model.batch_norm "
    # what tokenizer, front end and the weights' shapes say already
    "model.ctc_vocab_size model.ctc_blank_id model.sample_rate model.hop_length model.win_length "
    "model.n_mels model.n_fft model.hidden_ratio model.intermediate_size "
    # names of the original that change nothing here
    "model.hidden_act model.max_position_embeddings model.use_ctc "
    # the same of NeMo's models
    "model.vocab_size model.joint.num_extra_outputs model.encoder.dtype model.encoder.remat "
    "model.encoder.padding_counts model.encoder.dropout model.encoder.dropout_pre_encoder "
    "model.encoder.dropout_emb model.encoder.dropout_att model.encoder.att_context_probs "
    "model.encoder.stochastic_depth_drop_prob model.encoder.stochastic_depth_mode "
    "model.encoder.stochastic_depth_start_layer model.decoder.dropout model.joint.dropout "
    "model.decoder.random_state_sampling model.decoder.forget_gate_bias "
    "model.decoder.hidden_hidden_bias_scale model.decoder.weights_init_scale "
    "model.decoder.t_max".split()
)


def differences(theirs, ours):
    """{"model.rope_theta": (their value, our value), ...} of two runs' configs.

    A field that a config lacks has its default: it was saved before there was the field.

    Args:
      theirs, ours: mappings with "task", "model" and "front_end".

    Raises:
      settings.SettingsError: a field that is not known.
    """
    tasks = theirs.get("task"), ours.get("task")
    if tasks[0] != tasks[1]:
        return {"task": tasks}
    found, sections = {}, {"model": MODELS[tasks[0] or "ctc"], "front_end": FrontEndConfig}
    for section, cls in sections.items():
        old, new = (
            dict(leaves(section, settings.build(cls, c.get(section, {}), f"config.{section}")))
            for c in (theirs, ours)
        )
        found |= {name: (old[name], new[name]) for name in old}
    for name, default in OTHERS.get(tasks[0], {}).items():
        section, key = name.split(".")
        values = (c.get(section, {}).get(key, default) for c in (theirs, ours))
        found[name] = tuple(tuple(v) if isinstance(v, list) else v for v in values)
    if found.get("loss.kind") not in (None, ("tdt", "tdt")):
        found.pop("loss.durations")  # only TDT has them
    return {k: (a, b) for k, (a, b) in found.items() if a != b and k not in HARMLESS}


def leaves(path, values):
    """("model.encoder.d_model", value) of every field of a settings dataclass."""
    for field in dataclasses.fields(values):
        value, name = getattr(values, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(name, value)
        elif field.init:
            yield name, value


def listed(changes):
    """The differences in one line."""
    return ", ".join(f"{name} ({old!s:.60} -> {new!s:.60})" for name, (old, new) in changes.items())
