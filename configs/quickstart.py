"""The quickstart: connected digits in synthetic voices, trained in minutes on two CPU cores.

    make quickstart

or, step by step,

    python -m experiments.prepare_data synth --out_dir=runs/quickstart/corpus
    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart/model

Two minutes with the synthesis on 2 CPU cores; about 1 % WER on unseen voices (README).

Four blocks of bidirectional attention, depthwise convolution and gated MLP, every second one with a
LaCT fast-weight branch; 25 frames a second; characters.
"""

from configs import common


def get_config(arg=""):
    """The recipe; it has no variants."""
    if arg:
        raise ValueError(f"configs/quickstart.py has no variants, got {arg!r}")
    config = common.default()
    config.data.train = ("runs/quickstart/corpus/train.jsonl",)
    config.data.valid = ("runs/quickstart/corpus/valid.jsonl",)
    config.data.num_buckets = 1  # one shape, one program to compile
    config.data.bucket_batch_size = (8,)
    config.data.concat = 4  # utterances that share a row, so that little of it is padding
    config.data.concat_duration = 5.0
    config.text.vocabulary = tuple(" efghinorstuvwxz")  # the letters of zero ... nine

    config.front_end.kind = "nemo"
    config.spec_augment.update(
        freq_masks=2, freq_width=15, time_masks=2, time_width=0.04, fill="mean", warp=0.15
    )
    config.loss.ramp_steps = 300

    config.model.update(
        hidden_size=96,
        num_hidden_layers=4,
        num_attn_heads=4,
        num_lact_heads=2,
        intermediate_size=192,
        audio_encoder_layers=2,
        audio_encoder_dropout=0.0,
        subsampling=4,
        conv_kernel=15,
        lact_mode="bidirectional",
        lact_every=2,
        use_muon=False,
        use_momentum=False,
        positions="none",
        window_size=0,
        intermediate_ctc=(2,),
        initializer_range=0.0,
    )
    config.optim.update(
        lr=3e-3, schedule="cosine", warmup_steps=100, weight_decay=0.01, clip_norm=1.0, ema=0.99
    )
    config.train.update(steps=700, log_every=50, eval_every=350)
    return config.lock()
