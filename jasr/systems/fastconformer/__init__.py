"""NeMo's FastConformer recognisers: CTC, RNN-T, TDT and hybrids, with their files."""

from jasr.seam import Flag, Options, Part, System
from jasr.systems.catalogue import AUDIO
from jasr.systems.fastconformer import options


def _recipe(mapping):
    from jasr.systems.fastconformer import nemo_recipe

    return nemo_recipe.recipe(mapping)


SYSTEM = System(
    name="fastconformer",
    old_names=("parakeet",),
    sections={
        **AUDIO,
        "model": "jasr.systems.fastconformer.model:ParakeetConfig",
        "loss": "jasr.systems.fastconformer.settings:LossConfig",
        "decoding": "jasr.systems.fastconformer.settings:DecodingConfig",
    },
    task="jasr.systems.fastconformer.task:build",
    originals={
        "nemo": "jasr.systems.fastconformer.original:NEMO",
        "hf": "jasr.systems.fastconformer.original:HF",
    },
    parts={
        "encoder": Part("encoder", "model.encoder", {"fastconformer": ("encoder", "model.encoder")})
    },
    recipe=_recipe,
    options={
        "convert": Options(
            {
                "branch": Flag("export one head of a hybrid", ("transducer", "ctc")),
                "modern_front_end": Flag(
                    "export a model of NeMo before 2.5 with the front end and subsampling of 2.5",
                    parse=bool,
                    switch=True,
                ),
            },
            lambda config, given: {},
        ),
        "transcribe": Options(
            {
                "beam": Flag(
                    "hypotheses of a transducer's beam search; 1 = greedy", parse=options.beam
                ),
                "branch": Flag("of a hybrid (transducer)", ("transducer", "ctc")),
                "attention": Flag(
                    "local: frames read --att_context alone, so that 10 minutes go in one piece",
                    ("full", "local"),
                ),
                "att_context": Flag(
                    "frames left,right of local attention (128,128)", parse=options.context
                ),
            },
            options.changes,
        ),
    },
)
