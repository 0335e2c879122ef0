"""From a batch's audio to log-mel frames, as every task does it."""

import jax
import jax.numpy as jnp

from jasr import audio, settings
from jasr.audio import augment

REDUCTIONS = ("mean", "mean_batch", "mean_volume")


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


def reduced(losses, token_len, good, reduction):
    """(sum of losses, what to divide it by) of the rows that count.

    reduction: "mean" = mean over utterances of loss / tokens, "mean_batch" = mean over utterances,
    "mean_volume" = sum of losses / sum of tokens.
    """
    total = jnp.where(good, losses, 0.0)
    if reduction == "mean":
        length = jnp.maximum(token_len, 1).astype(jnp.float32)
        total, weight = jnp.sum(total / length), jnp.sum(good)
    elif reduction == "mean_batch":
        total, weight = jnp.sum(total), jnp.sum(good)
    elif reduction == "mean_volume":
        total, weight = jnp.sum(total), jnp.sum(jnp.where(good, token_len, 0))
    else:
        raise ValueError(f"config.loss.reduction {reduction!r}: choose {', '.join(REDUCTIONS)}")
    return total, weight.astype(jnp.float32)


def counts(task, batch, feasible):
    """The metrics that every task has: sums over the batch's utterances."""
    present = batch["audio_len"] > 0
    seconds = jnp.sum(batch["audio_len"]).astype(jnp.float32) / task.front_end.sample_rate
    return {
        "utterances": jnp.sum(present).astype(jnp.float32),
        "infeasible": jnp.sum(present & ~feasible).astype(jnp.float32),
        "audio_seconds": seconds,
    }
