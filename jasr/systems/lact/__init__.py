"""LaCT ASR: log-mel frames, convolutions, a transformer with fast weights, CTC."""

from jasr.seam import Flag, Options, System
from jasr.systems.catalogue import AUDIO


def _changes(config, given):
    return {"model.lact_updates": given["lact_updates"]} if "lact_updates" in given else {}


SYSTEM = System(
    name="lact",
    old_names=("ctc",),
    sections={
        **AUDIO,
        "model": "jasr.systems.lact.settings:LactConfig",
        "loss": "jasr.systems.lact.settings:CtcLossConfig",
    },
    task="jasr.systems.lact.task:build",
    originals={"lact": "jasr.systems.lact.original:LACT"},
    parts={},
    recipe=lambda mapping: None,
    options={
        "transcribe": Options(
            {
                "lact_updates": Flag(
                    "fast weights as trained (on), never updated (off), or without their branch",
                    ("on", "off", "no_branch"),
                )
            },
            _changes,
        )
    },
)
