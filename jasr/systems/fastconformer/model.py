"""NeMo's speech recognisers: a FastConformer encoder with a CTC head, a transducer, or both.

Parameters have NeMo's names: `encoder/...`, `decoder/...` (the CTC head of a CTC model, the
prediction network of a transducer), `joint/...`, `ctc_decoder/...` (the CTC head of a hybrid).
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from jasr import settings
from jasr.layers.basic import Weights
from jasr.models.fastconformer import encoder as fastconformer
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.systems.fastconformer.transducer import (
    ACTIVATIONS,
    Joint,
    JointConfig,
    Prediction,
    PredictionConfig,
)

KINDS = ("ctc", "rnnt", "tdt", "hybrid")


@settings.section
class PredictionSettings:
    """What a recipe says of the prediction network; the rest follows from the tokenizer."""

    pred_hidden: int = settings.field(640, least=1)
    pred_rnn_layers: int = settings.field(1, least=1)
    dropout: float = settings.field(0.2, least=0, below=1, meaning=False)
    blank_as_pad: bool = True
    random_state_sampling: bool = settings.field(False, meaning=False)
    forget_gate_bias: float | None = settings.field(1.0, meaning=False)
    hidden_hidden_bias_scale: float = settings.field(0.0, meaning=False)
    weights_init_scale: float = settings.field(1.0, meaning=False)
    t_max: int | None = settings.field(None, above=2, meaning=False)


@settings.section
class JointSettings:
    """What a recipe says of the joint network; the rest follows from encoder and tokenizer."""

    joint_hidden: int = settings.field(640, least=1)
    activation: str = settings.field("relu", choices=tuple(ACTIVATIONS))
    dropout: float = settings.field(0.2, least=0, below=1, meaning=False)
    # follows from the loss: as many as it has durations
    num_extra_outputs: int = settings.field(0, least=0, meaning=False)


@settings.section
class ParakeetConfig:
    """kind: "ctc", "rnnt", "tdt", or "hybrid", a transducer with a CTC head beside it."""

    kind: str = settings.field("tdt", choices=KINDS)
    encoder: FastConformerConfig = FastConformerConfig(
        subsampling="dw_striding",
        subsampling_factor=8,
        subsampling_conv_channels=256,
        n_heads=8,
        conv_kernel_size=9,
        xscaling=False,
    )
    decoder: PredictionSettings = PredictionSettings()
    joint: JointSettings = JointSettings()
    vocab_size: int = settings.field(0, meaning=False)  # tokens without the blank: the tokenizer's

    @property
    def is_transducer(self):
        return self.kind != "ctc"

    @property
    def has_ctc(self):
        return self.kind in ("ctc", "hybrid")

    @property
    def blank(self):
        """The id after the last token."""
        return self.vocab_size

    @property
    def prediction_config(self):
        """All settings of the prediction network."""
        fields = dataclasses.asdict(self.decoder)
        return PredictionConfig(self.vocab_size, **fields, dtype=self.encoder.dtype)

    @property
    def joint_config(self):
        """All settings of the joint network."""
        return JointConfig(
            num_classes=self.vocab_size,
            encoder_hidden=self.encoder.out_dim,
            pred_hidden=self.decoder.pred_hidden,
            **dataclasses.asdict(self.joint),
            dtype=self.encoder.dtype,
        )

    @property
    def frame_rate_divisor(self):
        """Mel frames in an encoder frame."""
        c = self.encoder
        return c.subsampling_factor * (c.reduction_factor if c.has_reduction else 1)


class CtcHead(nn.Module):
    """NeMo's ConvASRDecoder: logits f32[B,T,V+1] of encoder frames, the blank last."""

    outputs: int

    @nn.compact
    def __call__(self, x):
        shape = (1, x.shape[-1], self.outputs)  # that of a convolution of width 1
        init = nn.initializers.xavier_uniform()
        kernel, bias = Weights(shape, init, name="decoder_layers_0")()
        return jnp.matmul(x.astype(jnp.float32), kernel[0]) + bias


class Parakeet(nn.Module):
    """The model; `encode` first, then what a loss or a decoder asks for."""

    config: ParakeetConfig

    def setup(self):
        c = self.config
        self.encoder = fastconformer.FastConformer(c.encoder)
        if c.kind == "hybrid":
            self.ctc_decoder = CtcHead(c.vocab_size + 1)
        if not c.is_transducer:
            self.decoder = CtcHead(c.vocab_size + 1)
            return
        self.decoder = Prediction(c.prediction_config)
        self.joint = Joint(c.joint_config)

    def __call__(self, mel, mel_len):
        """Runs every part, so that all parameters are made."""
        x, _ = self.encode(mel, mel_len)
        if self.config.has_ctc:
            self.ctc_logits(x)
        if self.config.is_transducer:
            self.joint(x[:, :1], self.decoder(jnp.zeros((len(x), 1), jnp.int32)))

    def encode(self, mel, mel_len, train=False):
        """(frames [B,T',D], lengths i32[B]) of log-mel frames f32[B,T,F]."""
        return self.encoder(mel, mel_len, train)

    def ctc_logits(self, x):
        """f32[B,T',V+1] of encoder frames."""
        return (self.ctc_decoder if self.config.kind == "hybrid" else self.decoder)(x)

    def joint_parts(self, x, tokens, train=False):
        """What a transducer's loss takes: both sides of the joint network and its output layer.

        Returns:
          (enc [B,T',J], pred [B,U+1,J], kernel f32[J,V+1+E], bias f32[V+1+E]).
        """
        pred = self.joint.prediction_part(self.decoder(tokens, train))
        return self.joint.encoder_part(x), pred, *self.joint.output_layer()

    def encoder_part(self, x):
        """The encoder's side of the joint network, [B,T',J]."""
        return self.joint.encoder_part(x)

    def gate_table(self):
        """What `step` may be given, once for a batch: see `Prediction.gate_table`."""
        return self.decoder.gate_table()

    def step(self, token, state, table=None):
        """The prediction network's side [N,J] after one more token i32[N], and its state."""
        out, state = self.decoder.step(token, state, table)
        return self.joint.prediction_part(out), state

    def initial_state(self, rows):
        """The prediction network's state before the first token."""
        return self.decoder.initial_state(rows)

    def joint_output(self, enc, pred):
        """Logits f32[N,V+1+E] of both sides [N,J]."""
        return self.joint.output(enc + pred)


def sharding(config):
    """Regex rules parameter path -> axis names, for every parameter of the model."""
    rules = list(fastconformer.sharding(config.encoder))
    if config.has_ctc:
        name = "ctc_decoder" if config.kind == "hybrid" else "decoder"
        rules.append((rf"{name}/decoder_layers_0/kernel", (None, "fsdp", "tensor")))
        rules.append((rf"{name}/decoder_layers_0/bias", ("tensor",)))
    if config.is_transducer:
        rules += [
            (r"decoder/prediction/embed/embedding", ("tensor", "fsdp")),
            (r"decoder/prediction/dec_rnn/lstm/weight_(ih|hh)_l\d+", ("tensor", "fsdp")),
            (r"decoder/prediction/dec_rnn/lstm/bias_(ih|hh)_l\d+", ("tensor",)),
            (r"joint/(enc|pred)/kernel", ("fsdp", "tensor")),
            (r"joint/(enc|pred)/bias", ("tensor",)),
            (r"joint/joint_net/kernel", ("tensor", "fsdp")),
            (r"joint/joint_net/bias", (None,)),
        ]
    return tuple(rules)
