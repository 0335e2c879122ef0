"""Which settings decide what weights mean, and how two configs differ in them.

Asked wherever weights meet a config that is not their own: at resume, at `config.init.path`, when
checkpoints are averaged. Tokenizers are compared beside it.
"""

from jasr import settings
from jasr.features import FrontEndConfig
from jasr.models.lact_config import LactConfig

SECTIONS = {"model": LactConfig, "front_end": FrontEndConfig}

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
    "model.hidden_act model.max_position_embeddings model.use_ctc".split()
)


def differences(theirs, ours):
    """{"model.rope_theta": (their value, our value), ...} of two runs' configs.

    A field that a config lacks has its default: it was saved before there was the field.

    Args:
      theirs, ours: mappings with "task", "model" and "front_end".

    Raises:
      settings.SettingsError: a field that is not known.
    """
    found = {"task": (theirs.get("task"), ours.get("task"))}
    for section, cls in SECTIONS.items():
        old, new = (
            settings.to_dict(settings.build(cls, c.get(section, {}), f"config.{section}"))
            for c in (theirs, ours)
        )
        found |= {f"{section}.{name}": (old[name], new[name]) for name in old}
    return {k: (a, b) for k, (a, b) in found.items() if a != b and k not in HARMLESS}


def listed(changes):
    """The differences in one line."""
    return ", ".join(f"{name} ({old!s:.60} -> {new!s:.60})" for name, (old, new) in changes.items())
