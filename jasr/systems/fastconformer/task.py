"""The task of NeMo's recognisers: FastConformer with CTC, RNN-T, TDT, or a transducer and CTC."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jasr import audio, settings
from jasr.audio import augment, inputs
from jasr.data import AudioText, DataConfig
from jasr.decoding import transducer as decoding
from jasr.decoding.beam import beam_search
from jasr.decoding.ctc import ctc_greedy
from jasr.losses import transducer as losses
from jasr.losses.ctc import ctc_loss, frames_needed, has_path
from jasr.losses.reduction import contribution, scale_and_count
from jasr.models.fastconformer.settings import output_lengths
from jasr.systems.fastconformer import decoding as decoding_verbs
from jasr.systems.fastconformer import times
from jasr.systems.fastconformer.model import Parakeet, ParakeetConfig, sharding
from jasr.systems.fastconformer.settings import DecodingConfig, LossConfig
from jasr.training import validators


@dataclasses.dataclass(frozen=True)
class ParakeetTask:
    """Training and inference of one of NeMo's recognisers; see `build`."""

    tokenizer: Any
    model: Any
    front_end: audio.FrontEndConfig
    spec_augment: augment.SpecAugmentConfig
    wave_augment: augment.WaveAugmentConfig
    loss_config: LossConfig
    decoding: DecodingConfig
    data: DataConfig = DataConfig()
    groups: int = 1  # devices that a batch is split over: see `losses.joint`

    # What a vocabulary gives its meaning to.
    token_parameters = (
        r"(decoder/decoder_layers_0|ctc_decoder/decoder_layers_0|decoder/prediction/embed"
        r"|joint/joint_net)/.*"
    )

    @classmethod
    def build(cls, config, tokenizer, ways):
        """A task from the run's config (mapping with model, loss, ...) and its tokenizer.

        Raises:
          settings.SettingsError: a misspelt key or a value of the wrong kind.
          ValueError: settings that contradict each other, or a blank that is not the last id.
        """
        tokenizer = tokenizer.with_blank()
        model = settings.build(ParakeetConfig, config["model"], "config.model")
        loss = settings.build(LossConfig, config.get("loss", {}), "config.loss")
        given = inputs.sections(config)
        if tokenizer.blank_id != tokenizer.vocab_size - 1:
            raise ValueError(
                "these models need the blank as the last id: config.text.kind = 'sentencepiece', "
                "or a character vocabulary that ends with it"
            )
        if model.encoder.feat_in != given["front_end"].n_mels:
            raise ValueError(
                f"config.model.encoder.feat_in {model.encoder.feat_in} differs from "
                f"config.front_end.n_mels {given['front_end'].n_mels}"
            )
        if model.kind != loss.kind and (model.kind != "hybrid" or loss.kind == "ctc"):
            raise ValueError(
                f"config.loss.kind {loss.kind!r} does not train a model of kind {model.kind!r}"
            )
        how = settings.build(DecodingConfig, config.get("decoding", {}), "config.decoding")
        if how.branch == "ctc" and not model.has_ctc:
            raise ValueError(f"config.decoding.branch: a model of kind {model.kind!r} has no CTC")
        if how.strategy == "beam" and (not model.is_transducer or how.branch == "ctc"):
            raise ValueError(
                "config.decoding.strategy 'beam' is a transducer's; CTC is decoded greedily: set "
                "'greedy_batch'"
            )
        extra = len(loss.durations) if loss.kind == "tdt" else 0
        model = dataclasses.replace(
            model,
            vocab_size=tokenizer.vocab_size - 1,
            joint=dataclasses.replace(model.joint, num_extra_outputs=extra),
        )
        return cls(
            tokenizer=tokenizer,
            model=Parakeet(model),
            **given,
            loss_config=loss,
            decoding=how,
            data=settings.build(DataConfig, config.get("data", {}), "config.data"),
            groups=ways,
        )

    @property
    def config(self):
        """The model's settings."""
        return self.model.config

    @property
    def sharding(self):
        """Regex rules parameter path -> axis names."""
        return sharding(self.config)

    def frames_needed(self, tokens):
        """The fewest encoder frames that these token ids take.

        One for a transducer, but more for a TDT whose tokens all take time.
        """
        if self.config.kind == "ctc":
            return frames_needed(tokens)
        if self.loss_config.kind == "rnnt":
            return 1
        durations = self.loss_config.durations
        return len(tokens) * min(durations) + min(d for d in durations if d > 0)

    @property
    def seconds_per_frame(self):
        """Seconds between two encoder frames."""
        front = self.front_end
        return front.hop * self.config.frame_rate_divisor / front.sample_rate

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
        """Raises ValueError for buckets (B, S, L) that could not be trained on: there are none."""

    def features(self, batch):
        """Log-mel frames f32[B,T,F] and their lengths i32[B] of a batch's audio."""
        return inputs.features(self, batch)

    def init(self, rng, batch):
        """Fresh variables {"params", "batch_stats"} for a batch's shapes."""
        mel, mel_len = self.features(batch)
        variables = self.model.init({"params": rng}, mel, mel_len, batch["tokens"])
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    def terms(self, batch):
        """{"transducer" and/or "ctc": (share of the loss, f32[B] factor of each row's loss, f32[B]
        its part of the divisor)}, from data alone. A hybrid's CTC loss counts where a CTC path
        exists, the transducer's where one of its own."""
        c, loss = self.config, self.loss_config
        width, mel_len = inputs.mel_shape(self, batch)
        length = output_lengths(c.encoder, mel_len, width)
        tokens, token_len = batch["tokens"], batch["token_len"]
        present = batch["audio_len"] > 0
        found = {}
        if c.is_transducer:
            durations = loss.durations if loss.kind == "tdt" else None
            sizes = dict(frames=output_lengths(c.encoder, width, width), tokens=tokens.shape[1])
            good = losses.has_path(length, token_len, durations, **sizes)
            share = 1 - loss.ctc_weight if c.kind == "hybrid" else 1.0
            found["transducer"] = share, *scale_and_count(token_len, present & good, loss.reduction)
        if c.has_ctc:
            hybrid = c.kind == "hybrid"
            good = has_path(length, tokens, token_len)
            reduction = loss.ctc_reduction if hybrid else loss.reduction
            share = loss.ctc_weight if hybrid else 1.0
            found["ctc"] = share, *scale_and_count(token_len, present & good, reduction)
        return found

    def divisors(self, batch):
        """{name of a loss: f32[]}: what its sum over a whole batch is divided by."""
        return {name: jnp.sum(count) for name, (_, _, count) in self.terms(batch).items()}

    def loss(self, variables, batch, divisors, keys, step):
        """A micro-batch's share of the training loss; see `seam.Task.loss`.

        Returns:
          (f32[], (batch_stats, metrics)); metrics are counts or sums over utterances.
        """
        mel, mel_len = inputs.augmented_features(self, batch, keys["augment"], step)
        dropout, joint_key, omega_key = jax.random.split(keys["dropout"], 3)
        run = functools.partial(self.model.apply, rngs={"dropout": dropout})
        (x, length), changed = run(
            variables, mel, mel_len, train=True, method="encode", mutable=["batch_stats"]
        )
        noise = dict(
            dropout=self.config.joint.dropout,
            key=augment.row_keys(joint_key, batch["index"]),
        )
        if self.loss_config.omega:
            noise["omega"] = losses.sampled_omega(omega_key, self.loss_config.omega)
        found = self.scored(functools.partial(run, variables), x, length, batch, True, noise)
        total = jnp.float32(0.0)
        for name, (share, scale, _) in self.terms(batch).items():
            total += share * contribution(found[name][0], scale, divisors[name])
        feasible = functools.reduce(jnp.logical_and, [good for _, good in found.values()])
        metrics = inputs.counts(self, batch, feasible)
        return total, (changed.get("batch_stats", {}), metrics)

    def scored(self, run, x, length, batch, train, noise):
        """{"transducer" and/or "ctc": (f32[B] losses, bool[B] whether there is a path)}.

        Args:
          run: the model's methods on its variables; x, length: what `encode` gives.
          noise: dropout and key of the joint network, omega of this batch; {} in evaluation, where
            the loss is the one without omega.
        """
        c, loss = self.config, self.loss_config
        tokens, token_len = batch["tokens"], batch["token_len"]
        found = {}
        if c.is_transducer:
            parts = run(x, tokens, train=train, method="joint_parts")
            options = dict(
                blank=c.blank,
                fastemit_lambda=loss.fastemit_lambda,
                clamp=loss.clamp,
                groups=self.groups,
                activation=c.joint.activation,
                **noise,
            )
            score = losses.rnnt_loss
            if loss.kind == "tdt":
                score = losses.tdt_loss
                options |= dict(durations=loss.durations, sigma=loss.sigma)
            else:
                options.pop("omega", None)
            found["transducer"] = score(*parts, length, tokens, token_len, **options)
        if c.has_ctc:
            logits = run(x, method="ctc_logits")
            found["ctc"] = ctc_loss(logits, length, tokens, token_len, blank=c.blank)
        return found

    def row_losses(self, variables, batch):
        """{name: (f32[B] value, f32[B] count)}: the loss of validation is the sum over the names of
        the sum of values by that of counts."""
        run = functools.partial(self.model.apply, variables)
        x, length = run(*self.features(batch), method="encode")
        found = self.scored(run, x, length, batch, False, {})
        return {
            name: (share * jnp.where(scale > 0, found[name][0] * scale, 0.0), count)
            for name, (share, scale, count) in self.terms(batch).items()
        }

    @property
    def validators(self):
        """What a set can be measured by."""
        return {
            "wer": validators.transcripts(self.tokenizer, self.text, self.predict),
            "loss": validators.loss(self.row_losses),
        }

    @staticmethod
    def line(sums, seconds):
        """Columns of the training log: audio a second, infeasible rows."""
        return inputs.line(sums, seconds)

    def frames(self, variables, batch):
        """Encoder frames f[B,T,D] to decode and their lengths i32[B], of each row as if alone.

        Padding does not reach them through the subsampling, not even of a model of NeMo before 2.5,
        where the last frames were other ones in other batches (and other ones again with its
        pad_to above 0, which no released model has). It does, as in NeMo, where it counts in the
        norm of the convolutions (group, instance) or in the length (stacking).
        """
        c = self.config
        encoder = dataclasses.replace(c.encoder, masked_subsampling=True)
        model = Parakeet(dataclasses.replace(c, encoder=encoder))
        return model.apply(variables, *self.features(batch), method="encode")

    def tables(self, variables):
        """What `predict` computes of the weights alone, to be jitted.

        Where many batches are decoded it is kept as "tables" of the variables.
        """
        if self.decodes == "ctc":
            return {}
        return {"gates": self.model.apply(variables, method="gate_table")}

    def predict(self, variables, batch):
        """The best hypothesis of each row of a batch, to be jitted.

        Returns:
          dict of tokens i32[B,L], token_len i32[B], start_frame and end_frame i32[B,L] (encoder
          frames), logit_len i32[B]; of a transducer also durations i32[B,L], score f32[B] and
          full bool[B] (it stopped before the end, having no room for more labels).
        """
        c, how = self.config, self.decoding
        x, length = self.frames(variables, batch)
        if self.decodes == "ctc":
            logits = self.model.apply(variables, x, method="ctc_logits")
            names = ("tokens", "token_len", "start_frame", "end_frame")
            found = zip(names, ctc_greedy(logits, length, blank=c.blank), strict=True)
            return {**dict(found), "logit_len": length}
        run = functools.partial(self.model.apply, variables)
        table = variables.get("tables", {}).get("gates")
        if table is None and c.vocab_size < x.shape[0] * x.shape[1]:  # else it costs too much
            table = run(method="gate_table")
        steps = decoding.Steps(
            predict=functools.partial(run, method="step", table=table),
            initial_state=functools.partial(run, method="initial_state"),
            output=functools.partial(run, method="joint_output"),
        )
        options = dict(
            blank=c.blank,
            durations=self.loss_config.durations if self.decodes == "tdt" else None,
        )
        enc = run(x, method="encoder_part")
        if how.strategy == "beam":
            found = beam_search(
                enc,
                length,
                steps,
                beam=how.beam,
                max_symbols=how.max_symbols or 10,
                expansion_gamma=how.expansion_gamma,
                length_normalised=how.length_normalised,
                **options,
            )
            found = jax.tree.map(lambda x: x[:, 0], found)
        else:
            found = decoding.greedy(
                enc,
                length,
                steps,
                max_symbols=how.max_symbols or None,
                strategy=how.strategy,
                **options,
            )
        return {**found, "logit_len": length}

    @property
    def decodes(self):
        """What transcripts come from: "ctc", "rnnt" or "tdt"."""
        if not self.config.is_transducer or self.decoding.branch == "ctc":
            return "ctc"
        return self.loss_config.kind

    def text(self, tokens):
        """The text of tokens as NeMo writes it; see `nemo_times.text`."""
        return times.text(tokens, self.tokenizer)

    @property
    def heads(self):
        """(heads, durations) of the model as `text.vocab.expand` names them."""
        kind, loss = self.config.kind, self.loss_config
        heads = {"ctc": ("ctc",), "hybrid": (loss.kind, "ctc")}.get(kind, (kind,))
        return heads, loss.durations if "tdt" in heads else ()

    @property
    def verbs(self):
        """What the model can be asked for."""
        return {"transcribe": decoding_verbs.window_decoder(self)}


build = ParakeetTask.build
