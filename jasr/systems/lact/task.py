"""The CTC task: where front end, augmentation, model, loss, decoding and text meet."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from jasr import audio, settings
from jasr.audio import augment, inputs
from jasr.data import AudioText, DataConfig
from jasr.decoding.ctc import ctc_greedy
from jasr.losses.ctc import ctc_loss, frames_needed, has_path
from jasr.losses.reduction import contribution, scale_and_count
from jasr.systems.lact.decoding import window_decoder
from jasr.systems.lact.model import LactConfig, LactCtc, check_updates, encoder_frames, sharding
from jasr.systems.lact.settings import CtcLossConfig
from jasr.training import validators


@dataclasses.dataclass(frozen=True)
class CtcTask:
    """Training and inference of a CTC model; see `build`."""

    tokenizer: Any
    model: Any
    front_end: audio.FrontEndConfig
    spec_augment: augment.SpecAugmentConfig
    wave_augment: augment.WaveAugmentConfig
    loss_config: CtcLossConfig
    data: DataConfig = DataConfig()

    @classmethod
    def build(cls, config, tokenizer, ways):
        """A task from the run's config (mapping with model, front_end, ...) and its tokenizer.

        Raises:
          settings.SettingsError: a misspelt key or a value of the wrong kind.
          ValueError: settings that contradict each other.
        """
        tokenizer = tokenizer.with_blank()
        model = settings.build(LactConfig, config["model"], "config.model")
        given = inputs.sections(config)
        front_end = given["front_end"]
        model = dataclasses.replace(
            model,
            ctc_vocab_size=tokenizer.vocab_size,
            ctc_blank_id=tokenizer.blank_id,
            **_front_end_fields(model, front_end),
        )
        if model.audio_feature_dim != front_end.n_mels:
            raise ValueError(
                f"config.model.audio_feature_dim {model.audio_feature_dim} differs from "
                f"config.front_end.n_mels {front_end.n_mels}"
            )
        return cls(
            tokenizer=tokenizer,
            model=LactCtc(model),
            **given,
            loss_config=settings.build(CtcLossConfig, config.get("loss", {}), "config.loss"),
            data=settings.build(DataConfig, config.get("data", {}), "config.data"),
        )

    # What a vocabulary gives its meaning to.
    token_parameters = r"ctc_head/.*|model/self_condition/.*"

    @property
    def config(self):
        """The model's settings."""
        return self.model.config

    @property
    def sharding(self):
        """Regex rules parameter path -> axis names."""
        return sharding(self.config)

    @property
    def seconds_per_frame(self):
        """Seconds between two output frames."""
        return self.front_end.hop * self.config.subsampling / self.front_end.sample_rate

    @property
    def layout(self):
        """One recording a row, or several joined, and their text."""
        return AudioText(
            self.data,
            self.front_end.sample_rate,
            self.tokenizer.encode,
            frames_needed,
            self.seconds_per_frame,
        )

    def check(self, shapes):
        """Raises ValueError if no bucket (B, S, L) would ever get a fast-weight update."""
        longest = max(samples for _, samples, _ in shapes)
        check_updates(self.config, longest // self.front_end.hop)

    def features(self, batch):
        """Log-mel frames f32[B,T,F] and their lengths i32[B] of a batch's audio."""
        return inputs.features(self, batch)

    def init(self, rng, batch):
        """Fresh variables {"params", "batch_stats"} for a batch's shapes."""
        mel, mel_len = self.features(batch)
        variables = self.model.init({"params": rng}, mel, mel_len, train=False)
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    def terms(self, batch):
        """{name: (f32[B] factor of each row's loss, f32[B] its part of the divisor)}, from data
        alone: rows without audio (padding) and rows that no CTC path fits count nothing."""
        _, mel_len = inputs.mel_shape(self, batch)
        good = has_path(
            encoder_frames(self.config, mel_len), batch["tokens"], batch["token_len"]
        ) & (batch["audio_len"] > 0)
        return {"ctc": scale_and_count(batch["token_len"], good, self.loss_config.reduction)}

    def divisors(self, batch):
        """{"ctc": f32[]}: what the sum of the losses of a whole batch is divided by."""
        return {name: jnp.sum(count) for name, (_, count) in self.terms(batch).items()}

    def loss(self, variables, batch, divisors, keys, step):
        """A micro-batch's share of the training loss; see `seam.Task.loss`.

        Returns:
          (f32[], (batch_stats, metrics)); metrics are counts or sums over utterances.
        """
        mel, mel_len = inputs.augmented_features(self, batch, keys["augment"], step)
        out, changed = self.model.apply(
            variables,
            mel,
            mel_len,
            train=True,
            rngs={"dropout": keys["dropout"]},
            mutable=["batch_stats"],
        )
        scale, _ = self.terms(batch)["ctc"]
        losses, feasible = self.ctc(out, batch)
        present = batch["audio_len"] > 0
        metrics = {
            **inputs.counts(self, batch, feasible),
            "updates": jnp.sum(jnp.where(present, out["updates"], 0)).astype(jnp.float32),
        }
        total = contribution(losses, scale, divisors["ctc"])
        return total, (changed.get("batch_stats", {}), metrics)

    def ctc(self, out, batch):
        """(f32[B] losses, bool[B] whether there is a path) of the model's output."""
        rows = (out["logit_len"], batch["tokens"], batch["token_len"])
        score = functools.partial(ctc_loss, blank=self.tokenizer.blank_id)
        losses, feasible = score(out["logits"], *rows)
        if out["intermediate"]:
            share = self.loss_config.intermediate_weight
            inner = [score(x, *rows)[0] for x in out["intermediate"]]
            losses = (1 - share) * losses + share * sum(inner) / len(inner)
        return losses, feasible

    def row_losses(self, variables, batch):
        """{"ctc": (f32[B] value, f32[B] count)}: the loss of validation is the sum of the values
        by that of the counts."""
        out = self.model.apply(variables, *self.features(batch), train=False)
        scale, count = self.terms(batch)["ctc"]
        losses, _ = self.ctc(out, batch)
        return {"ctc": (jnp.where(scale > 0, losses * scale, 0.0), count)}

    @property
    def validators(self):
        """What a set can be measured by."""
        return {
            "wer": validators.transcripts(
                self.tokenizer, self.tokenizer.decode, self.predict, ("updates",)
            ),
            "loss": validators.loss(self.row_losses),
        }

    @staticmethod
    def line(sums, seconds):
        """Columns of the training log: audio a second, fast-weight updates, infeasible rows."""
        updates = {"updates_per_utt": sums["updates"] / max(sums["utterances"], 1.0)}
        return inputs.line(sums, seconds) | updates

    heads = ((), ())  # its vocabulary is one of characters, which is not expanded

    @property
    def verbs(self):
        """What the model can be asked for."""
        return {"transcribe": window_decoder(self)}

    def predict(self, variables, batch):
        """Greedy CTC of a batch, to be jitted.

        Returns:
          dict of tokens i32[B,T'], token_len i32[B], start_frame and end_frame i32[B,T'] (output
          frames), logit_len i32[B], updates i32[B] (fast-weight updates of each utterance).
        """
        mel, mel_len = self.features(batch)
        out = self.model.apply(variables, mel, mel_len, train=False)
        tokens, token_len, start, end = ctc_greedy(
            out["logits"], out["logit_len"], blank=self.tokenizer.blank_id
        )
        return {
            "tokens": tokens,
            "token_len": token_len,
            "start_frame": start,
            "end_frame": end,
            "logit_len": out["logit_len"],
            "updates": out["updates"],
        }


def _front_end_fields(model, front_end):
    """The fields of LactConfig that name the original's front end, as `front_end` has them.

    Raises:
      ValueError: one was set to something else.
    """
    n_fft = front_end.n_fft or 1 << (front_end.win - 1).bit_length()
    keys = dict(sample_rate="sample_rate", hop_length="hop", win_length="win", n_mels="n_mels")
    fields = {name: getattr(front_end, key) for name, key in keys.items()} | {"n_fft": n_fft}
    for name, value in fields.items():
        if getattr(model, name) not in (value, getattr(LactConfig, name)):
            raise ValueError(
                f"config.model.{name} {getattr(model, name)} differs from "
                f"config.front_end.{keys.get(name, name)} {value}, which is what is computed"
            )
    return fields


build = CtcTask.build
