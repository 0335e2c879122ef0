"""The task of NeMo's recognisers: FastConformer with CTC, RNN-T, TDT, or a transducer and CTC."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jasr import settings
from jasr.audio import augment
from jasr.decoding import transducer as decoding
from jasr.decoding.beam import beam_search
from jasr.decoding.ctc import ctc_greedy
from jasr.losses import ctc, transducer
from jasr.losses.reduction import scale_and_count
from jasr.models.fastconformer.settings import output_lengths
from jasr.seam import WindowDecoder
from jasr.systems.fastconformer import times
from jasr.systems.fastconformer.model import Parakeet, ParakeetConfig, sharding
from jasr.systems.fastconformer.settings import DecodingConfig, LossConfig
from jasr.training.audio_task import AudioTask, window_seconds

LOCAL_SECONDS = 600.0  # the window of local attention


@dataclasses.dataclass(frozen=True)
class ParakeetTask(AudioTask):
    """Training and inference of one of NeMo's recognisers; see `build`."""

    decoding: DecodingConfig = DecodingConfig()
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
        given = cls.sections(config, LossConfig)
        loss = given["loss_config"]
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
        return cls(tokenizer, Parakeet(model), **given, decoding=how, groups=ways)

    @property
    def sharding(self):
        """Regex rules parameter path -> axis names."""
        return sharding(self.config)

    def frames_needed(self, tokens):
        """The fewest encoder frames that these token ids take.

        One for a transducer, but more for a TDT whose tokens all take time.
        """
        if self.config.kind == "ctc":
            return ctc.frames_needed(tokens)
        if self.loss_config.kind == "rnnt":
            return 1
        durations = self.loss_config.durations
        return len(tokens) * min(durations) + min(d for d in durations if d > 0)

    @property
    def frame(self):
        """Samples between two encoder frames."""
        return self.front_end.hop * self.config.frame_rate_divisor

    def terms(self, batch):
        """See `AudioTask.divisors`: "transducer" and/or "ctc". A hybrid's CTC loss counts where a
        CTC path exists, the transducer's where one of its own."""
        c, loss = self.config, self.loss_config
        width, mel_len = self.mel_shape(batch)
        length = output_lengths(c.encoder, mel_len, width)
        tokens, token_len = batch["tokens"], batch["token_len"]
        present, hybrid = batch["audio_len"] > 0, c.kind == "hybrid"
        found = {}
        if c.is_transducer:
            durations = loss.durations if loss.kind == "tdt" else None
            sizes = dict(frames=output_lengths(c.encoder, width, width), tokens=tokens.shape[1])
            good = transducer.has_path(length, token_len, durations, **sizes)
            share = 1 - loss.ctc_weight if hybrid else 1.0
            found["transducer"] = share, *scale_and_count(token_len, present & good, loss.reduction)
        if c.has_ctc:
            good = ctc.has_path(length, tokens, token_len)
            reduction = loss.ctc_reduction if hybrid else loss.reduction
            share = loss.ctc_weight if hybrid else 1.0
            found["ctc"] = share, *scale_and_count(token_len, present & good, reduction)
        return found

    def losses(self, variables, batch, frames, keys):
        """See `AudioTask.loss`; that of evaluation is the one without omega."""
        c, loss, noise, train = self.config, self.loss_config, {}, keys is not None
        tokens, token_len = batch["tokens"], batch["token_len"]
        run = functools.partial(self.model.apply, variables)
        if train:
            dropout, joint_key, omega_key = jax.random.split(keys["dropout"], 3)
            run = functools.partial(run, rngs={"dropout": dropout})
            noise = dict(dropout=c.joint.dropout, key=augment.row_keys(joint_key, batch["index"]))
            if loss.omega and loss.kind == "tdt":
                noise["omega"] = transducer.sampled_omega(omega_key, loss.omega)
        (x, length), changed = run(*frames, train=train, method="encode", mutable=["batch_stats"])
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
            score = transducer.rnnt_loss
            if loss.kind == "tdt":
                score = transducer.tdt_loss
                options |= dict(durations=loss.durations, sigma=loss.sigma)
            found["transducer"] = score(*parts, length, tokens, token_len, **options)
        if c.has_ctc:
            logits = run(x, method="ctc_logits")
            found["ctc"] = ctc.ctc_loss(logits, length, tokens, token_len, blank=c.blank)
        return found, changed.get("batch_stats", {}), {}

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
        """The text of tokens as NeMo writes it; see `times.text`."""
        return times.text(tokens, self.tokenizer)

    @property
    def heads(self):
        """(heads, durations) of the model as `text.vocab.expand` names them."""
        kind, loss = self.config.kind, self.loss_config
        heads = {"ctc": ("ctc",), "hybrid": (loss.kind, "ctc")}.get(kind, (kind,))
        return heads, loss.durations if "tdt" in heads else ()

    @property
    def verbs(self):
        """What the model can be asked for: windows decoded greedily or by a beam, with NeMo's
        timestamps on request."""
        timed, front = self.decodes != "ctc", self.front_end

        def decode(variables, batch):
            found = self.predict(variables, batch)
            return {**found, "heard": heard(found) if timed else found["logit_len"]}

        def prepare(variables):
            return {**variables, "tables": jax.jit(self.tables)(variables)}

        def window(meta, trained):
            if self.config.encoder.is_local:
                return LOCAL_SECONDS
            longest = nemo_section(meta, "train_ds").get("max_duration")
            if trained or not isinstance(longest, (int, float)):
                return window_seconds(trained)
            return min(60.0, max(8.0, longest))

        def nemo_times(tokens, start_frame, end_frame, durations=None, *, meta):
            given = nemo_section(meta, "decoding")
            separators = given.get("segment_seperators")  # NeMo's spelling
            return times.timestamps(
                self.decodes,
                tokens,
                start_frame,
                end_frame,
                self.tokenizer,
                durations=durations if self.decodes == "tdt" else None,
                window_stride=front.hop / front.sample_rate,
                subsampling=self.config.frame_rate_divisor,
                separators=tuple(separators) if isinstance(separators, list) else times.SEPARATORS,
                segment_gap=given.get("segment_gap_threshold"),
            )

        decoder = WindowDecoder(
            sample_rate=front.sample_rate,
            frame=self.frame,
            tokenizer=self.tokenizer,
            decode=decode,
            prepare=prepare,
            window=window,
            text=self.text,
            marks=times.punctuation(self.tokenizer),
            columns=("durations",) if timed else (),
            extras={"nemo": nemo_times},
        )
        return {"transcribe": decoder}


def heard(found):
    """i32[B] frames that a transducer has decoded: a row that is full stopped at its last token."""
    last = jnp.maximum(found["token_len"] - 1, 0)[:, None]
    end = jnp.take_along_axis(found["end_frame"], last, axis=1)[:, 0]
    return jnp.where(found["full"] & (found["token_len"] > 0), end, found["logit_len"])


def nemo_section(meta, name):
    """A section of the NeMo config that a model came with; {} without one."""
    config = meta.get("nemo", {}).get("config", {})
    found = config.get(name) or (config.get("model") or {}).get(name)
    return found if isinstance(found, dict) else {}


build = ParakeetTask.build
