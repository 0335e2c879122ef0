"""What the tasks of recognisers have in common: audio to log-mel frames, losses that are ratios."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jasr import audio, settings
from jasr.audio import augment
from jasr.audio.features import mel_lengths
from jasr.data import AudioText, DataConfig
from jasr.losses.reduction import contribution
from jasr.systems import catalogue
from jasr.training import validators


def window_seconds(trained):
    """Seconds seen at once by a model whose longest row in training had so many (0: unknown)."""
    return min(30.0, max(8.0, trained)) if trained else 20.0


@dataclasses.dataclass(frozen=True)
class AudioTask:
    """A seam.Task of a model that hears log-mel frames.

    A subclass has what its model decides: `frame`, `frames_needed`, `terms`, `losses`, `predict`,
    `text`, and the members of seam.Task that are not here.
    """

    tokenizer: Any
    model: Any
    front_end: audio.FrontEndConfig
    spec_augment: augment.SpecAugmentConfig
    wave_augment: augment.WaveAugmentConfig
    loss_config: Any
    data: DataConfig = DataConfig()

    means: ClassVar[tuple] = ()  # columns of `predict` that are metrics, too

    @staticmethod
    def sections(config, loss):
        """The settings that the fields above hold, of a run's config; loss: the class of its own.

        Raises:
          settings.SettingsError: a misspelt key or a value of the wrong kind.
        """
        kinds = {name: catalogue.resolve(place) for name, place in catalogue.AUDIO.items()}
        kinds |= {"loss": loss, "data": DataConfig}
        found = {n: settings.build(c, config.get(n, {}), f"config.{n}") for n, c in kinds.items()}
        return found | {"loss_config": found.pop("loss")}

    @property
    def config(self):
        """The model's settings."""
        return self.model.config

    @property
    def seconds_per_frame(self):
        """Seconds between two frames of the model's output."""
        return self.frame / self.front_end.sample_rate

    @property
    def layout(self):
        """One recording a row, or several joined, and their text."""
        return AudioText(
            self.data,
            self.front_end.sample_rate,
            self.tokenizer.encode,
            self.frames_needed,
            self.seconds_per_frame,
        )

    def check(self, shapes):
        """Accepts all buckets (B, S, L); see `seam.Task.check`."""

    def features(self, batch):
        """Log-mel frames f32[B,T,F] and their lengths i32[B] of a batch's audio."""
        return audio.log_mel(batch["audio"], batch["audio_len"], self.front_end)

    def augmented(self, batch, rng, step):
        """As `features`, with noise, gain and SpecAugment; row r knows only (rng, index[r]).

        The augmentation's strength rises over the first `loss_config.ramp_steps` steps.
        """
        ramp = self.loss_config.ramp_steps
        scale = jnp.minimum(1.0, (step + 1) / ramp) if ramp else jnp.float32(1.0)
        keys = augment.row_keys(rng, batch["index"])
        split = jax.vmap(lambda k: jax.random.split(k, 3))(keys)
        wave_keys, mel_keys, dither_keys = jnp.unstack(split, axis=1)
        wave = augment.augment_waveform(
            batch["audio"], batch["audio_len"], wave_keys, self.wave_augment, scale
        )
        mel, mel_len = audio.log_mel(wave, batch["audio_len"], self.front_end, keys=dither_keys)
        return augment.spec_augment(mel, mel_len, mel_keys, self.spec_augment, scale), mel_len

    def mel_shape(self, batch):
        """(width of the features of a batch's audio, their lengths i32[B]), without computing."""
        mel, _ = jax.eval_shape(lambda b: self.features(b), batch)
        return mel.shape[1], mel_lengths(batch["audio_len"], self.front_end)

    def init(self, rng, batch):
        """Fresh variables {"params", "batch_stats"} for a batch's shapes."""
        variables = self.model.init({"params": rng}, *self.features(batch))
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    def divisors(self, batch):
        """{name of a loss: f32[]}: what its sum over a whole batch is divided by.

        terms(batch) is {name: (share of the loss, f32[B] factor of each row's loss, f32[B] its part
        of the divisor)}, from data alone: rows without audio (padding) and rows without a path
        count nothing.
        """
        return {name: jnp.sum(count) for name, (_, _, count) in self.terms(batch).items()}

    def loss(self, variables, batch, divisors, keys, step):
        """A micro-batch's share of the training loss; see `seam.Task.loss`.

        losses(variables, batch, (mel, mel_len), keys) is ({name: (f32[B] losses, bool[B] whether
        there is a path)}, new batch_stats, {further metric: f32[] sum}); keys None: evaluation.

        Returns:
          (f32[], (batch_stats, metrics)); metrics are counts or sums over utterances.
        """
        frames = self.augmented(batch, keys["augment"], step)
        found, stats, more = self.losses(variables, batch, frames, keys)
        total = jnp.float32(0.0)
        for name, (share, scale, _) in self.terms(batch).items():
            total += share * contribution(found[name][0], scale, divisors[name])
        feasible = functools.reduce(jnp.logical_and, [good for _, good in found.values()])
        present = batch["audio_len"] > 0
        seconds = jnp.sum(batch["audio_len"]).astype(jnp.float32) / self.front_end.sample_rate
        metrics = {
            "utterances": jnp.sum(present).astype(jnp.float32),
            "infeasible": jnp.sum(present & ~feasible).astype(jnp.float32),
            "audio_seconds": seconds,
        }
        return total, (stats, {**metrics, **more})

    def row_losses(self, variables, batch):
        """{name: (f32[B] value, f32[B] count)}: the loss of validation is the sum over the names of
        the sum of values by that of counts."""
        found, _, _ = self.losses(variables, batch, self.features(batch), None)
        return {
            name: (share * jnp.where(scale > 0, found[name][0] * scale, 0.0), count)
            for name, (share, scale, count) in self.terms(batch).items()
        }

    @property
    def validators(self):
        """What a set can be measured by."""
        wer = validators.transcripts(self.tokenizer, self.text, self.predict, self.means)
        return {"wer": wer, "loss": validators.loss(self.row_losses)}

    @staticmethod
    def line(sums, seconds):
        """Columns of the training log: audio a second, infeasible rows."""
        columns = {"audio_s_per_s": sums["audio_seconds"] / seconds}
        return columns | ({"infeasible": int(sums["infeasible"])} if sums["infeasible"] else {})
