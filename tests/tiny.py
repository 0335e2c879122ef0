"""A recipe of seconds on the committed synthetic speech, for tests of the whole loop.

`python -m experiments.train --config=tests/tiny.py --workdir=...` runs it.
"""

import pathlib

from configs import common

DATA = pathlib.Path(__file__).resolve().parent / "data"


def get_config(arg=""):
    """The recipe; `arg` may be "dropout", which makes the random numbers of a step matter."""
    config = common.default()
    config.data.train = (str(DATA / "train.jsonl"),)
    config.data.valid = (str(DATA / "valid.jsonl"),)
    config.data.bucket_duration_bins = (4.0,)
    config.data.bucket_batch_size = (8,)
    config.data.num_threads = 1
    config.spec_augment.update(freq_masks=1, freq_width=4, time_masks=1, time_width=0.05)
    config.model.update(
        hidden_size=32, num_hidden_layers=2, num_attn_heads=2, num_lact_heads=2,
        intermediate_size=32, audio_encoder_layers=2, subsampling=4, conv_kernel=3,
        lact_mode="bidirectional", lact_every=2, positions="none", window_size=0,
        audio_encoder_dropout=0.0, initializer_range=0.15,
    )  # fmt: skip
    # A large eps: Adam would blow the rounding noise of gradients that are zero up to full steps.
    config.optim.update(lr=5e-4, schedule="constant", warmup_steps=5, eps=1e-4, ema=0.9)
    config.train.update(steps=20, log_every=1, eval_every=10)
    if arg == "dropout":
        config.model.dropout = 0.1
    return config.lock()
