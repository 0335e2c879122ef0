"""LaCT ASR on CMU's AN4: letters, digits and commands, 38 minutes of training speech.

    python -m experiments.prepare_data an4 AN4_DIR data/an4
    python -m experiments.train --config=configs/lact_an4.py --workdir=runs/an4 \\
        --config.data.train=data/an4/train.jsonl --config.data.valid=data/an4/valid.jsonl

One run: 27 minutes on 2 CPU cores, 8.8 % WER and 4.9 % CER on `valid` (log in the README).

Six blocks of bidirectional attention, depthwise convolution and gated MLP, with a LaCT
fast-weight branch in every second one; 25 frames a second; characters.
"""

from configs import common


def get_config(arg=""):
    """The recipe; `arg` "short" is 3000 steps, "control" has no fast weights."""
    config = common.default()
    config.data.train = ("data/an4/train.jsonl",)
    config.data.valid = ("data/an4/valid.jsonl",)
    config.data.max_duration = 20.0
    config.data.speeds = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
    config.data.concat = 4
    config.data.bucket_duration_bins = (6.5,)  # the longest one; rounded up to 7.04, four joined
    config.data.bucket_batch_size = (5,)
    config.data.length_multiple = 10240  # 16 output frames: products of whole vectors
    config.text.vocabulary = tuple(" abcdefghijklmnopqrstuvwxyz'")

    config.front_end.normalize = "none"  # not compared fairly with "per_feature" yet
    config.spec_augment.update(
        freq_masks=2, freq_width=20, time_masks=5, time_width=0.05, fill="mean", warp=0.15
    )
    config.wave_augment.update(gain_db=6.0, noise_share=0.5, snr_low_db=10.0, snr_high_db=40.0)
    config.loss.ramp_steps = 1000

    config.model.update(
        hidden_size=144,
        num_hidden_layers=6,
        num_attn_heads=3,
        num_lact_heads=2,
        intermediate_size=432,
        audio_encoder_layers=2,
        subsampling=4,
        conv_kernel=15,
        lact_mode="bidirectional",
        lact_every=2,
        use_muon=False,
        use_momentum=False,
        positions="none",
        window_size=0,
        fw_base_lr=0.01,
        intermediate_ctc=(3,),
        dropout=0.15,
        initializer_range=0.0,
    )
    config.optim.update(
        lr=2.5e-3, schedule="cosine", warmup_steps=200, weight_decay=0.05, clip_norm=1.0, ema=0.999
    )
    config.train.update(steps=8000, log_every=100, eval_every=1000, sample_every=500)

    if arg == "short":
        config.train.steps = 3000
    elif arg == "control":
        config.model.lact_every = 0
    elif arg:
        raise ValueError(f"configs/lact_an4.py has variants short and control, not {arg!r}")
    return config.lock()
