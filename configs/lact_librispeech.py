"""LaCT ASR on LibriSpeech at the sizes of the original LaCT ASR.

    python -m experiments.prepare_data librispeech LIBRISPEECH data/libri --parts \\
        train-clean-100 dev-clean                # --download fetches them into LIBRISPEECH
    python -m experiments.train --config=configs/lact_librispeech.py:improved --workdir=runs/ls

It reads data/libri/shar/train-clean-100 and dev-clean; other places: --config.data.train, .valid.

Variants: `base` (88.6 M parameters, the default), `improved` (311.2 M), `large` (316.9 M); a suffix
`_reference` (`base_reference`) trains what the original trained: causal attention and chunks of
4096 frames, so that no utterance ever updates its fast weights. Without it the fast weights are
updated once with all frames of an utterance and attention sees both sides. Front end, vocabulary
by frequency, optimizer and step counts are the original's, except that the warm-up of 2000 steps
really happens and accumulation divides (it neither did there). Batches hold 24 utterances, two
micro-batches of 12. These runs need accelerators and have not been made with jasr; the original's
best dev-clean WER was 22.7 %.
"""

from configs import common

VARIANTS = ("base", "improved", "large")


def get_config(arg="base"):
    """The recipe of a size, see the module's docstring."""
    from jasr import settings
    from jasr.audio import HTK
    from jasr.systems.lact import model as lact

    size, _, reference = (arg or "base").partition("_")
    if size not in VARIANTS or reference not in ("", "reference"):
        raise ValueError(
            f"configs/lact_librispeech.py has variants {', '.join(VARIANTS)}, each also with "
            f"_reference behind it, not {arg!r}"
        )
    config = common.default()
    config.data.train = ("data/libri/shar/train-clean-100",)
    config.data.valid = ("data/libri/shar/dev-clean",)
    config.data.max_duration = 20.0
    config.data.num_buckets = 6
    config.data.bucket_batch_size = (24,)
    config.text.vocabulary = tuple(" etaonihsrdlumcwfgypbvk'xjqz")

    config.front_end.update(settings.to_dict(HTK))
    config.spec_augment.update(fill="mean", freq_masks=2, freq_width=27, time_masks=10)
    config.model.update(getattr(lact, size.upper()))
    config.model.lact_mode = "bidirectional"
    config.model.window_size = 0
    if reference:
        config.model.update(lact_mode="reference", window_size=4096, batch_norm="reference")
        config.spec_augment.update(freq_masks=0, time_masks=0)

    config.optim.update(
        lr=1e-4,
        schedule="linear",
        warmup_steps=2000,
        b1=0.9,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.01,
        decay_rules=((".*", 1.0),),
        clip_norm=1.0,
        accumulate=2,
    )
    # 40 epochs of train-clean-100's 28 539 utterances
    config.train.update(steps=47500, log_every=100, sample_every=500, eval_every=1000)
    config.checkpoint.update(keep_latest=2, keep_best=3)
    return config.lock()
