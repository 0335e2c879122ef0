"""The task of NeMo's recognisers: FastConformer with CTC, RNN-T, TDT, or a transducer and CTC."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jasr import audio, augment, settings
from jasr.decoding import transducer as decoding
from jasr.decoding.ctc import ctc_greedy
from jasr.losses import transducer as losses
from jasr.losses.ctc import ctc_loss
from jasr.models.parakeet import Parakeet, ParakeetConfig, sharding
from jasr.tasks import inputs


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """NeMo's losses and how utterance losses become one number.

    reduction: see `inputs.reduced`; NeMo's default is mean_batch. sigma and omega: see `tdt_loss`;
    omega is drawn once a step, as NeMo does. ctc_weight: a hybrid's loss is (1 - weight) times the
    transducer's plus weight times CTC's.
    """

    kind: str = "tdt"  # "ctc" | "rnnt" | "tdt"
    reduction: str = "mean_batch"
    durations: tuple = (0, 1, 2, 3, 4)  # frames, in the order of the TDT outputs
    sigma: float = 0.02
    omega: float = 0.1
    fastemit_lambda: float = 0.0
    clamp: float = -1.0  # NeMo's clamp of the joint's gradient; only -1 (none) is supported
    ctc_weight: float = 0.3
    ctc_reduction: str = "mean_batch"
    ramp_steps: int = 0  # augmentation strength rises linearly from 0 over so many steps

    def __post_init__(self):
        if self.kind not in ("ctc", "rnnt", "tdt"):
            raise ValueError(f"config.loss.kind {self.kind!r}: choose ctc, rnnt or tdt")
        if self.clamp > 0:
            raise ValueError("config.loss.clamp: gradients of the joint are not clamped; set -1")


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How a transducer is decoded; see `decoding.transducer.greedy`."""

    strategy: str = "greedy_batch"  # "greedy_batch" | "greedy"
    max_symbols: int = 10  # labels at one frame, at most
    branch: str = "transducer"  # of a hybrid: "transducer" | "ctc"


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

    # What a vocabulary gives its meaning to.
    TOKEN_PARAMETERS = (
        r"(decoder/decoder_layers_0|ctc_decoder/decoder_layers_0|decoder/prediction/embed"
        r"|joint/joint_net)/.*"
    )

    @classmethod
    def build(cls, config, tokenizer):
        """A task from the run's config (mapping with model, loss, ...) and its tokenizer.

        Raises:
          settings.SettingsError: a misspelt key or a value of the wrong kind.
          ValueError: settings that contradict each other, or a blank that is not the last id.
        """
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
            decoding=settings.build(DecodingConfig, config.get("decoding", {}), "config.decoding"),
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
        """The fewest encoder frames that these token ids take: CTC's, or one for a transducer."""
        if self.config.kind == "ctc":
            return len(tokens) + sum(a == b for a, b in zip(tokens, tokens[1:], strict=False))
        return 1

    @property
    def seconds_per_frame(self):
        """Seconds between two encoder frames."""
        front = self.front_end
        return front.hop * self.config.frame_rate_divisor / front.sample_rate

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

    def loss(self, variables, batch, keys, step):
        """Summed training loss, and what to divide it by; see `CtcTask.loss`.

        A hybrid's CTC loss counts where a CTC path exists; the transducer's needs only frames.
        """
        c, loss = self.config, self.loss_config
        mel, mel_len = inputs.augmented_features(self, batch, keys["augment"], step)
        dropout, joint_key, omega_key = jax.random.split(keys["dropout"], 3)
        run = functools.partial(self.model.apply, rngs={"dropout": dropout})
        (x, length), changed = run(
            variables, mel, mel_len, train=True, method="encode", mutable=["batch_stats"]
        )
        tokens, token_len = batch["tokens"], batch["token_len"]
        present = batch["audio_len"] > 0
        parts = []  # (share, reduction, losses, feasible)
        if c.is_transducer:
            enc, pred, kernel, bias = run(variables, x, tokens, train=True, method="joint_parts")
            options = dict(
                blank=c.blank,
                fastemit_lambda=loss.fastemit_lambda,
                activation=c.joint.activation,
                dropout=c.joint.dropout,
                key=augment.row_keys(joint_key, batch["index"]),
            )
            score = losses.rnnt_loss
            if loss.kind == "tdt":
                score = losses.tdt_loss
                options |= dict(durations=loss.durations, sigma=loss.sigma)
                if loss.omega:
                    options["omega"] = losses.sampled_omega(omega_key, loss.omega)
            got = score(enc, pred, kernel, bias, length, tokens, token_len, **options)
            share = 1 - loss.ctc_weight if c.kind == "hybrid" else 1.0
            parts.append((share, loss.reduction, *got))
        if c.has_ctc:
            logits = run(variables, x, method="ctc_logits")
            got = ctc_loss(logits, length, tokens, token_len, blank=c.blank)
            hybrid = c.kind == "hybrid"
            share = loss.ctc_weight if hybrid else 1.0
            parts.append((share, loss.ctc_reduction if hybrid else loss.reduction, *got))
        main = parts[0]
        total, weight = inputs.reduced(main[2], token_len, present & main[3], main[1])
        total = main[0] * total
        for share, reduction, values, feasible in parts[1:]:
            # what is summed here is divided by the main loss's divisor later
            extra, own = inputs.reduced(values, token_len, present & feasible, reduction)
            total += share * extra * weight / jnp.maximum(own, 1.0)
        metrics = {
            "weight": weight,
            **inputs.counts(self, batch, functools.reduce(jnp.logical_and, [p[3] for p in parts])),
        }
        return total, (changed.get("batch_stats", {}), metrics)

    def predict(self, variables, batch):
        """Greedy decoding of a batch, to be jitted.

        Returns:
          dict of tokens i32[B,L], token_len i32[B], start_frame and end_frame i32[B,L] (encoder
          frames), logit_len i32[B]; of a transducer also durations i32[B,L] and score f32[B].
        """
        c = self.config
        mel, mel_len = self.features(batch)
        x, length = self.model.apply(variables, mel, mel_len, method="encode")
        if not c.is_transducer or (c.kind == "hybrid" and self.decoding.branch == "ctc"):
            logits = self.model.apply(variables, x, method="ctc_logits")
            names = ("tokens", "token_len", "start_frame", "end_frame")
            found = zip(names, ctc_greedy(logits, length, blank=c.blank), strict=True)
            return {**dict(found), "logit_len": length}
        run = functools.partial(self.model.apply, variables)
        steps = decoding.Steps(
            predict=functools.partial(run, method="step", table=run(method="gate_table")),
            initial_state=functools.partial(run, method="initial_state"),
            output=functools.partial(run, method="joint_output"),
        )
        found = decoding.greedy(
            run(x, method="encoder_part"),
            length,
            steps,
            blank=c.blank,
            durations=self.loss_config.durations if self.loss_config.kind == "tdt" else None,
            max_symbols=self.decoding.max_symbols or None,
            strategy=self.decoding.strategy,
        )
        return {**found, "logit_len": length}
