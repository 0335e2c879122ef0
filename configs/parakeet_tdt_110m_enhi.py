"""Fine-tuning a Parakeet TDT of 110 M parameters whose vocabulary was given a second language.

    python -m experiments.train_tokenizer data/hi/train.jsonl --vocab_size=256 --output=data/hi_tok
    python -m experiments.expand_vocab --checkpoint=parakeet-tdt_ctc-110m.nemo \\
        --tokenizer=data/hi_tok/tokenizer.model --output=runs/en_hi_init
    python -m experiments.train --config=configs/parakeet_tdt_110m_enhi.py --workdir=runs/en_hi \\
        --config.init=runs/en_hi_init --config.optim.name=adamw8bit

Variants: `hybrid` (the default: TDT with a CTC head beside it, as that file has them) and `tdt`,
for a model without the CTC head. Model and front end are that file's; where another file differs,
the start is refused with a list of what to set. The tokenizer is the one of config.init.

Of the utterances that are drawn each [path, weight] pair of config.data.train has the share that
its weight says. Half of them are English here, for two sets of like size; where there is little of
the new language give it the share that it has (README, "A second language"). The new rows learn
before the rest does, if the encoder stands still for a first run:

    --config.init.freeze="('encoder/.*',)" --config.train.steps=2000 --config.optim.lr=1e-3 \\
        --config.optim.warmup_steps=200

and a second run with --config.init=runs/en_hi trains everything. Optimizer, schedule and
SpecAugment are NeMo's. The sizes want accelerators; the run has not been made with jasr.
"""

from configs import common

STEPS = 20000


def get_config(arg="hybrid"):
    """The recipe, with or without the CTC head."""
    from jasr.training import schedules

    kind = arg or "hybrid"
    if kind not in ("hybrid", "tdt"):
        raise ValueError(
            f"configs/parakeet_tdt_110m_enhi.py has variants hybrid and tdt, not {arg!r}"
        )
    config = common.default("fastconformer")
    config.data.train = (("data/en/train.jsonl", 1.0), ("data/hi/train.jsonl", 1.0))
    config.data.valid = ("data/en/valid.jsonl", "data/hi/valid.jsonl")
    config.data.max_duration = 20.0
    config.data.num_buckets = 6
    config.data.batch_duration = 480.0
    config.text.kind = "init"

    config.spec_augment.update(style="nemo", freq_masks=2, time_masks=10)
    config.model.kind = kind
    config.model.encoder.update(n_layers=17, d_model=512, dropout_emb=0.0, dropout_att=0.1)
    config.model.decoder.update(pred_hidden=640, pred_rnn_layers=1, dropout=0.2)
    config.model.joint.update(joint_hidden=640, dropout=0.2)
    config.loss.update(kind="tdt", durations=(0, 1, 2, 3, 4), sigma=0.02, omega=0.1)

    config.optim.update(
        lr=2e-4, b1=0.9, b2=0.98, eps=1e-8, weight_decay=1e-3, decay_rules=((".*", 1.0),)
    )
    schedule = {"name": "CosineAnnealing", "warmup_steps": 1000, "min_lr": 1e-6}
    config.optim.update(schedules.from_nemo(schedule, STEPS))
    config.optim.decay_steps = 0  # = config.train.steps, whatever that is set to
    config.train.update(steps=STEPS, log_every=100, eval_every=2000, sample_every=1000)
    config.checkpoint.update(keep_latest=2, keep_best=3)
    return config.lock()
