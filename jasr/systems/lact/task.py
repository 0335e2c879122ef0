"""The CTC task: where front end, augmentation, model, loss, decoding and text meet."""

import dataclasses
import functools

import jax.numpy as jnp

from jasr import settings
from jasr.decoding.ctc import ctc_greedy
from jasr.losses import ctc
from jasr.losses.reduction import scale_and_count
from jasr.seam import WindowDecoder
from jasr.systems.lact.model import LactConfig, LactCtc, check_updates, encoder_frames, sharding
from jasr.systems.lact.settings import CtcLossConfig
from jasr.training.audio_task import AudioTask, window_seconds


@dataclasses.dataclass(frozen=True)
class CtcTask(AudioTask):
    """Training and inference of a CTC model; see `build`."""

    # What a vocabulary gives its meaning to.
    token_parameters = r"ctc_head/.*|model/self_condition/.*"
    heads = ((), ())  # its vocabulary is one of characters, which is not expanded
    means = ("updates",)
    frames_needed = staticmethod(ctc.frames_needed)

    @classmethod
    def build(cls, config, tokenizer, ways):
        """A task from the run's config (mapping with model, front_end, ...) and its tokenizer.

        Raises:
          settings.SettingsError: a misspelt key or a value of the wrong kind.
          ValueError: settings that contradict each other.
        """
        tokenizer = tokenizer.with_blank()
        model = settings.build(LactConfig, config["model"], "config.model")
        given = cls.sections(config, CtcLossConfig)
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
        return cls(tokenizer, LactCtc(model), **given)

    @property
    def sharding(self):
        """Regex rules parameter path -> axis names."""
        return sharding(self.config)

    @property
    def frame(self):
        """Samples between two output frames."""
        return self.front_end.hop * self.config.subsampling

    def check(self, shapes):
        """Raises ValueError if no bucket (B, S, L) would ever get a fast-weight update."""
        longest = max(samples for _, samples, _ in shapes)
        check_updates(self.config, longest // self.front_end.hop)

    def terms(self, batch):
        """See `AudioTask.divisors`."""
        _, mel_len = self.mel_shape(batch)
        length, tokens, token_len = (
            encoder_frames(self.config, mel_len),
            batch["tokens"],
            batch["token_len"],
        )
        good = ctc.has_path(length, tokens, token_len) & (batch["audio_len"] > 0)
        return {"ctc": (1.0, *scale_and_count(token_len, good, self.loss_config.reduction))}

    def losses(self, variables, batch, frames, keys):
        """See `AudioTask.loss`."""
        out, changed = self.model.apply(
            variables,
            *frames,
            train=keys is not None,
            rngs=keys and {"dropout": keys["dropout"]},
            mutable=["batch_stats"],
        )
        rows = (out["logit_len"], batch["tokens"], batch["token_len"])
        score = functools.partial(ctc.ctc_loss, blank=self.tokenizer.blank_id)
        losses, feasible = score(out["logits"], *rows)
        if out["intermediate"]:
            share = self.loss_config.intermediate_weight
            inner = [score(x, *rows)[0] for x in out["intermediate"]]
            losses = (1 - share) * losses + share * sum(inner) / len(inner)
        updates = jnp.sum(jnp.where(batch["audio_len"] > 0, out["updates"], 0))
        more = {"updates": updates.astype(jnp.float32)}
        return {"ctc": (losses, feasible)}, changed.get("batch_stats", {}), more

    @staticmethod
    def line(sums, seconds):
        """Columns of the training log: audio a second, fast-weight updates, infeasible rows."""
        updates = {"updates_per_utt": sums["updates"] / max(sums["utterances"], 1.0)}
        return AudioTask.line(sums, seconds) | updates

    def predict(self, variables, batch):
        """Greedy CTC of a batch, to be jitted.

        Returns:
          dict of tokens i32[B,T'], token_len i32[B], start_frame and end_frame i32[B,T'] (output
          frames), logit_len i32[B], updates i32[B] (fast-weight updates of each utterance).
        """
        out = self.model.apply(variables, *self.features(batch))
        blank = self.tokenizer.blank_id
        found = ctc_greedy(out["logits"], out["logit_len"], blank=blank)
        names = ("tokens", "token_len", "start_frame", "end_frame")
        return {name: out[name] for name in ("logit_len", "updates")} | dict(zip(names, found))

    def text(self, tokens):
        """The text of token ids."""
        return self.tokenizer.decode(tokens)

    @property
    def verbs(self):
        """What the model can be asked for: greedy CTC of windows."""

        def decode(variables, batch):
            found = self.predict(variables, batch)
            return {**found, "heard": found["logit_len"]}

        decoder = WindowDecoder(
            sample_rate=self.front_end.sample_rate,
            frame=self.frame,
            tokenizer=self.tokenizer,
            decode=decode,
            prepare=lambda variables: variables,
            window=lambda meta, trained: window_seconds(trained),
            text=self.text,
            totals={"updates": "fast-weight updates an utterance and layer"},
        )
        return {"transcribe": decoder}


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
