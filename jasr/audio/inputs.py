"""From a batch's audio to log-mel frames, as every task does it."""

import jax
import jax.numpy as jnp

from jasr import audio, settings
from jasr.audio import augment
from jasr.audio.features import mel_lengths


def sections(config):
    """The settings front_end, spec_augment and wave_augment of a run's config, by name."""
    kinds = {
        "front_end": audio.FrontEndConfig,
        "spec_augment": augment.SpecAugmentConfig,
        "wave_augment": augment.WaveAugmentConfig,
    }
    return {k: settings.build(v, config.get(k, {}), f"config.{k}") for k, v in kinds.items()}


def features(task, batch):
    """Log-mel frames f32[B,T,F] and their lengths i32[B] of a batch's audio."""
    return audio.log_mel(batch["audio"], batch["audio_len"], task.front_end)


def augmented_features(task, batch, rng, step):
    """As `features`, with noise, gain and SpecAugment; row r knows only (rng, index[r]).

    The augmentation's strength rises over the first `loss_config.ramp_steps` steps.
    """
    ramp = task.loss_config.ramp_steps
    scale = jnp.minimum(1.0, (step + 1) / ramp) if ramp else jnp.float32(1.0)
    keys = augment.row_keys(rng, batch["index"])
    split = jax.vmap(lambda k: jax.random.split(k, 3))(keys)
    wave_keys, mel_keys, dither_keys = jnp.unstack(split, axis=1)
    wave = augment.augment_waveform(
        batch["audio"], batch["audio_len"], wave_keys, task.wave_augment, scale
    )
    mel, mel_len = audio.log_mel(wave, batch["audio_len"], task.front_end, keys=dither_keys)
    return augment.spec_augment(mel, mel_len, mel_keys, task.spec_augment, scale), mel_len


def mel_shape(task, batch):
    """(width of the features of a batch's audio, their lengths i32[B]); nothing is computed."""
    mel, _ = jax.eval_shape(lambda b: features(task, b), batch)
    return mel.shape[1], mel_lengths(batch["audio_len"], task.front_end)


def counts(task, batch, feasible):
    """Sums over the batch's utterances that every task logs: utterances, those without a path, and
    seconds of audio."""
    present = batch["audio_len"] > 0
    seconds = jnp.sum(batch["audio_len"]).astype(jnp.float32) / task.front_end.sample_rate
    return {
        "utterances": jnp.sum(present).astype(jnp.float32),
        "infeasible": jnp.sum(present & ~feasible).astype(jnp.float32),
        "audio_seconds": seconds,
    }


def line(sums, seconds):
    """Columns of the training log, from sums of `counts` over an interval of so many seconds."""
    columns = {"audio_s_per_s": sums["audio_seconds"] / seconds}
    return columns | ({"infeasible": int(sums["infeasible"])} if sums["infeasible"] else {})
