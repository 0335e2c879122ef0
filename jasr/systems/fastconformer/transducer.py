"""Prediction network and joint network of a transducer, as in NeMo (RNNTDecoder, RNNTJoint).

Weights have NeMo's names: `prediction/embed/embedding`, `prediction/dec_rnn/lstm/weight_ih_l0` ...
under the decoder, `enc`, `pred` and `joint_net` with kernel and bias under the joint network. The
LSTM's arrays are torch's own: [4P, P], gates in the order input, forget, cell, output.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jasr import settings
from jasr.layers.basic import Weights, record
from jasr.layers.lstm import gates_of, lstm, lstm_step

ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh, "sigmoid": nn.sigmoid}
DTYPES = ("float32", "bfloat16")


@settings.section
class PredictionConfig:
    """NeMo's RNNTDecoder: keys of its section and of `prednet` in it, with their defaults; dtype
    is ours. The blank is the id after the last token, `vocab_size`."""

    vocab_size: int = settings.field(least=1)
    pred_hidden: int = settings.field(640, least=1)
    pred_rnn_layers: int = settings.field(1, least=1, most=50)
    dropout: float = settings.field(0.0, least=0, below=1)  # after each layer
    blank_as_pad: bool = True  # whether the table has a row for the blank, all zeros
    random_state_sampling: bool = False  # training starts from states drawn from N(0, 1)
    # initial values
    forget_gate_bias: float | None = 1.0
    hidden_hidden_bias_scale: float = 0.0  # of the second bias of the forget gate
    weights_init_scale: float = 1.0
    # instead: biases for memories of 1 to t_max - 1 tokens
    t_max: int | None = settings.field(None, above=2)
    dtype: str = settings.field("float32", choices=DTYPES)

    @property
    def blank(self):
        return self.vocab_size


@settings.section
class JointConfig:
    """NeMo's RNNTJoint: keys of its section and of `jointnet` in it; dtype is ours."""

    num_classes: int = settings.field(least=1)  # tokens without the blank, which follows them
    encoder_hidden: int = settings.field(least=1)
    pred_hidden: int = settings.field(least=1)
    joint_hidden: int = settings.field(least=1)
    # TDT: a logit of each duration, after the blank's
    num_extra_outputs: int = settings.field(0, least=0)
    activation: str = settings.field("relu", choices=tuple(ACTIVATIONS))
    dropout: float = settings.field(0.0, least=0, below=1)
    dtype: str = settings.field("float32", choices=DTYPES)

    @property
    def blank(self):
        return self.num_classes

    @property
    def outputs(self):
        """Logits of a node: the tokens, the blank, the durations."""
        return self.num_classes + 1 + self.num_extra_outputs


def uniform(bound):
    """Initial values from U(-bound, bound), torch's way."""
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # torch.nn.LSTM's names


class _Recurrence(nn.Module):
    """`dec_rnn`: the layers' weights under torch.nn.LSTM's names."""

    config: PredictionConfig

    def setup(self):
        self.lstm = self.param("lstm", self.drawn)

    def layers(self):
        """Of each layer weight_ih, weight_hh, both [4P, P], and the sum of its two biases."""
        for i in range(self.config.pred_rnn_layers):
            w_ih, w_hh, b_ih, b_hh = (self.lstm[f"{name}_l{i}"] for name in LSTM)
            yield w_ih, w_hh, b_ih + b_hh

    def drawn(self, key):
        """All arrays with NeMo's initial values."""
        c, P, arrays = self.config, self.config.pred_hidden, {}
        draw = uniform(P**-0.5)
        for i in range(c.pred_rnn_layers):
            keys = jax.random.split(jax.random.fold_in(key, i), 4)
            for name, key_of in zip(LSTM, keys, strict=True):
                if name.startswith("weight"):
                    made = draw(key_of, (4 * P, P))
                elif c.t_max is not None:  # chrono initialisation (Tallec and Ollivier, 2018)
                    drawn = jax.random.uniform(key_of, (P,), minval=1.0, maxval=c.t_max - 1.0)
                    made = jnp.concatenate([-jnp.log(drawn), jnp.log(drawn), jnp.zeros(2 * P)])
                else:
                    made = draw(key_of, (4 * P,))
                    forget = made.at[P : 2 * P]  # the bias of the forget gate
                    if c.forget_gate_bias is not None and name == "bias_ih":
                        made = forget.set(c.forget_gate_bias)
                    elif c.forget_gate_bias is not None:
                        made = forget.multiply(c.hidden_hidden_bias_scale)
                arrays[f"{name}_l{i}"] = made * c.weights_init_scale
        return arrays


class _Network(nn.Module):
    """`prediction`: the table and the recurrence."""

    config: PredictionConfig

    def setup(self):
        c = self.config

        def table(key, shape, dtype):  # the blank's row is zeros
            drawn = jax.random.normal(key, shape, dtype)
            return drawn.at[c.blank].set(0.0) if c.blank_as_pad else drawn

        self.embed = nn.Embed(c.vocab_size + c.blank_as_pad, c.pred_hidden, embedding_init=table)
        self.dec_rnn = _Recurrence(c)
        self.drop = nn.Dropout(c.dropout)

    def look_up(self, tokens):
        """Rows of the table; zeros, without gradient, of the blank."""
        is_token = tokens != self.config.blank
        rows = self.embed(jnp.where(is_token, tokens, 0))
        return jnp.where(is_token[..., None], rows, 0.0).astype(self.config.dtype)


class Prediction(nn.Module):
    """What the labels so far say of the next one.

    tokens i32[B, U] -> [B, U + 1, P]: the output after the start and after each token. `step` does
    one token at a time. Dropout and drawn states take the random stream "dropout".
    """

    config: PredictionConfig

    def setup(self):
        self.prediction = _Network(self.config)

    def __call__(self, tokens, train=False):
        c, net = self.config, self.prediction
        x = jnp.pad(net.look_up(tokens), ((0, 0), (1, 0), (0, 0)))  # a zero vector first
        state = self.initial_state(len(tokens))
        if train and c.random_state_sampling:
            keys = jax.random.split(self.make_rng("dropout"))
            state = tuple(jax.random.normal(k, s.shape) for k, s in zip(keys, state))
        for i, (w_ih, w_hh, bias) in enumerate(net.dec_rnn.layers()):
            x = lstm(x, w_ih, w_hh, bias, state[0][i], state[1][i])
            x = net.drop(x, deterministic=not train)
        record(self, "decoder_out", x)
        return x

    def initial_state(self, batch):
        """(h, c), zeros f32[L, B, P] each."""
        zeros = jnp.zeros((self.config.pred_rnn_layers, batch, self.config.pred_hidden))
        return zeros, zeros

    def gate_table(self):
        """What each token and the blank add to the first layer's gates, f32[V + 1, 4P].

        Made once for a batch that is decoded, it spares `step` the larger of its two products.
        """
        w_ih, _, bias = next(self.prediction.dec_rnn.layers())
        every = jnp.arange(self.config.vocab_size + 1)
        return gates_of(self.prediction.look_up(every), w_ih, bias)

    def step(self, token, state, table=None):
        """The output [B, P] after one more token i32[B], and the state after it.

        Decoding starts with the blank, which stands for the start, and `initial_state`. table: the
        `gate_table`.
        """
        net, dtype = self.prediction, self.config.dtype
        x, h, c = None, [], []
        for i, (w_ih, w_hh, bias) in enumerate(net.dec_rnn.layers()):
            if i == 0 and table is not None:
                gates = table[token]
            else:
                gates = gates_of(net.look_up(token) if i == 0 else x, w_ih, bias)
            after = lstm_step(gates, w_hh, state[0][i], state[1][i], dtype)
            h.append(after[0])
            c.append(after[1])
            x = after[0].astype(dtype)
        return x, (jnp.stack(h), jnp.stack(c))


def _linear(x, weights, dtype):
    kernel, bias = weights()
    return x.astype(dtype) @ kernel.astype(dtype) + bias.astype(dtype)


class Joint(nn.Module):
    """Logits of all nodes, from the encoder's and the prediction network's outputs.

    joint(f [B, T, D], g [B, U + 1, P]) -> [B, T, U + 1, V + 1 + E]: tokens, blank, durations. The
    losses take the parts instead, `encoder_part`, `prediction_part` and `output_layer`; decoding
    `output(encoder_part(f) + prediction_part(g))` of the nodes it comes to.
    """

    config: JointConfig

    def setup(self):
        c = self.config

        def weights(*shape):  # with torch's initial values
            draw = uniform(1 / math.sqrt(shape[0]))
            return Weights(shape, draw, draw)

        self.enc = weights(c.encoder_hidden, c.joint_hidden)
        self.pred = weights(c.pred_hidden, c.joint_hidden)
        self.joint_net = weights(c.joint_hidden, c.outputs)
        self.drop = nn.Dropout(c.dropout)

    def __call__(self, f, g, train=False):
        x = self.encoder_part(f)[:, :, None] + self.prediction_part(g)[:, None]
        return self.output(x, train)

    def encoder_part(self, f):
        """[..., D] -> [..., J]."""
        x = _linear(f, self.enc, self.config.dtype)
        record(self, "enc_proj", x)
        return x

    def prediction_part(self, g):
        """[..., P] -> [..., J]."""
        x = _linear(g, self.pred, self.config.dtype)
        record(self, "pred_proj", x)
        return x

    def output(self, x, train=False):
        """Logits [..., V + 1 + E] of the sum of the two parts [..., J]: activation, dropout and
        the output layer, as NeMo's `joint_net`."""
        hidden = self.drop(ACTIVATIONS[self.config.activation](x), deterministic=not train)
        return _linear(hidden, self.joint_net, self.config.dtype)

    def output_layer(self):
        """kernel f32[J, V + 1 + E] and bias f32[V + 1 + E] of the output layer."""
        return self.joint_net()
