"""LaCT ASR: log-mel frames -> convolutions -> blocks of (attention + fast weights, gated MLP) ->
CTC logits.

The original is NeverWL/LaCT's lact_asr; every parameter keeps its name, with torch's dots as
slashes and list indices joined by "_" ("model.layers.0.attn.qkv.weight" is
"model/layers_0/attn/qkv/kernel"):

    model/audio_feature_extractor/conv_layers_{4i}/{kernel,bias}      convolution i, [3, in, out]
    model/audio_feature_extractor/conv_layers_{4i+1}/{scale,bias}     its batch norm
    model/layers_{n}/{attn_norm,mlp_norm}/scale
    model/layers_{n}/attn/...                                         see layer.py
    model/layers_{n}/mlp/{gate_proj,up_proj,down_proj}/kernel
    model/norm/scale, ctc_head/kernel
    model/layers_{n}/conv/...                                         ours, when conv_kernel > 0
    self_condition/kernel                                             ours, with self_conditioning
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jasr.layers.attention import rope_table
from jasr.layers.basic import BatchNorm, Dropout, RMSNorm, depthwise, frame_mask
from jasr.systems.lact.layer import LactLayer, fast_state, kernel_init, linear
from jasr.systems.lact.settings import (  # noqa: F401  (the model's public names)
    BASE,
    IMPROVED,
    LARGE,
    LactConfig,
    check_updates,
    encoder_frames,
    num_updates,
)


def sinusoids(frames, dim):
    """f32[T,D] sinusoidal positions: sin in even channels, cos in odd ones, base 10000."""
    cos, sin = rope_table(frames, dim, 10000.0)
    return jnp.stack([sin, cos], -1).reshape(frames, -1)[:, :dim]


class Conv(nn.Module):
    """Convolution of width 3 over time, padding 1, as one product of stacked neighbours: [B,T,C]
    -> [B,ceil(T/stride),features].

    stride 2 puts output t on frames 2t-1, 2t, 2t+1 (torch's padding=1).
    """

    features: int
    stride: int
    config: LactConfig

    @nn.compact
    def __call__(self, x):
        batch, frames, dim = x.shape
        kernel = self.param("kernel", kernel_init(self.config), (3, dim, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        end = -(-frames // self.stride) * self.stride
        x = jnp.pad(x.astype(self.config.dtype), ((0, 0), (1, 1 + end - frames), (0, 0)))
        x = jnp.concatenate([x[:, i : i + end : self.stride] for i in range(3)], axis=-1)
        return x @ kernel.reshape(3 * dim, -1).astype(x.dtype) + bias.astype(x.dtype)


class AudioFeatureExtractor(nn.Module):
    """Convolution stack: channels double from the mel bins and end at hidden_size; positions are
    added."""

    config: LactConfig

    @nn.compact
    def __call__(self, mel, mel_len, train):
        c = self.config
        masked = c.batch_norm == "masked"
        x, length, dim, left = mel, mel_len, mel.shape[-1], c.subsampling
        for i in range(c.audio_encoder_layers):
            dim = c.hidden_size if i == c.audio_encoder_layers - 1 else 2 * dim
            stride = 2 if left > 1 else 1
            left //= stride
            if masked:  # what lies in the padding must not reach a valid frame through the kernel
                x = jnp.where(frame_mask(length, x.shape[1]), x, 0)
            x = Conv(dim, stride, c, name=f"conv_layers_{4 * i}")(x)
            length = -(-length // stride)
            mask = frame_mask(length, x.shape[1]) if masked else None
            x = BatchNorm(name=f"conv_layers_{4 * i + 1}")(x, mask, train)
            x = jax.nn.relu(x)
            x = Dropout(c.audio_encoder_dropout)(x, train)
        if c.positions == "sinusoidal":
            x = x + sinusoids(x.shape[1], dim)
        return x.astype(c.dtype), length


class GatedMLP(nn.Module):
    config: LactConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = linear(c, c.mlp_size, "gate_proj")(x)
        up = linear(c, c.mlp_size, "up_proj")(x)
        return linear(c, c.hidden_size, "down_proj")(jax.nn.silu(gate) * up)


class ConvModule(nn.Module):
    """The Conformer's convolution module with RMS norms in place of batch norm; reads no
    padding."""

    config: LactConfig

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        x, gate = jnp.split(linear(c, 2 * c.hidden_size, "pointwise_conv1")(x), 2, axis=-1)
        x = jnp.where(mask, x * jax.nn.sigmoid(gate), 0)
        init = nn.initializers.normal(c.conv_kernel**-0.5)
        kernel = self.param("depthwise_conv", init, (c.conv_kernel, c.hidden_size))
        before = c.conv_kernel - 1 if c.causal else (c.conv_kernel - 1) // 2
        x = depthwise(x, kernel.astype(x.dtype), before)
        x = jax.nn.silu(RMSNorm(c.norm_eps, name="norm")(x))
        return linear(c, c.hidden_size, "pointwise_conv2")(x)


class Block(nn.Module):
    """Pre-norm residual block: attention + fast weights, convolution module (optional), gated
    MLP."""

    config: LactConfig
    fast: bool

    @nn.compact
    def __call__(self, x, length, table, train, stream=None):
        c = self.config

        def drop(x):
            return Dropout(c.dropout)(x, train)

        def norm(name, x):
            return RMSNorm(c.norm_eps, c.elementwise_affine, name=name)(x)

        y = norm("attn_norm", x)
        y, stream = LactLayer(c, self.fast, name="attn")(y, length, table, stream)
        x = x + drop(y)
        if c.conv_kernel:
            y = ConvModule(c, name="conv")(norm("conv_norm", x), frame_mask(length, x.shape[1]))
            x = x + drop(y)
        y = GatedMLP(c, name="mlp")(norm("mlp_norm", x))
        return x + drop(y), stream


class Model(nn.Module):
    """The encoder: mel f32[B,T,F] -> hidden [B,T',D] after the final norm, their length, what
    intermediate CTC reads, and the state of a stream."""

    config: LactConfig

    @nn.compact
    def __call__(self, mel, mel_len, train, head, stream=None):
        c = self.config
        x, length = AudioFeatureExtractor(c, name="audio_feature_extractor")(mel, mel_len, train)
        x = Dropout(c.dropout)(x, train)
        table = rope_table(x.shape[1], c.head_dim, c.rope_theta)
        norm = RMSNorm(c.norm_eps, c.elementwise_affine, name="norm")
        block = nn.remat(Block, static_argnums=(4,)) if c.remat else Block
        intermediate, after = [], {}
        if c.self_conditioning and c.intermediate_ctc:
            condition = linear(c, c.hidden_size, "self_condition")
        for n in range(c.num_hidden_layers):
            name = f"layers_{n}"
            before = stream and (stream["fresh"], stream[name])
            x, after[name] = block(c, c.has_lact(n), name=name)(x, length, table, train, before)
            if n + 1 in c.intermediate_ctc:
                logits = head(norm(x))
                intermediate.append(logits)
                if c.self_conditioning:
                    probabilities = jax.nn.softmax(logits.astype(jnp.float32)).astype(x.dtype)
                    x = x + condition(probabilities)
        x = norm(x)
        if stream:
            stream = {**after, "fresh": jnp.zeros_like(stream["fresh"])}
        return x, length, tuple(intermediate), stream


def stream_state(config, batch):
    """What a stream of so many rows begins with, for LactCtc: {"fresh" bool[B]: rows that begin
    anew, "layers_N": the state of its fast weights}. A row is begun again by setting its "fresh".
    """
    names = [f"layers_{n}" for n in range(config.num_hidden_layers)]
    made = {name: fast_state(config, batch) for name in names}
    return {**made, "fresh": jnp.ones(batch, bool)}


class LactCtc(nn.Module):
    """The recogniser. Variables: params, batch_stats; rngs: dropout (training only)."""

    config: LactConfig = LactConfig()

    @nn.compact
    def __call__(self, mel, mel_len, *, train=False, stream=None):
        """CTC logits of a batch of log-mel frames.

        Args:
          mel: f32[B,T,F]. mel_len: i32[B] valid frames; what lies beyond has no effect (with
          batch_norm="masked").
          train: batch statistics and dropout; batch_stats must then be mutable.
          stream: where the frames are a segment of recordings, `stream_state` or what came back
            for the segment before; attention and convolutions see the segment alone.

        Returns:
          dict of logits f32[B,T',V] with T' = ceil(T / subsampling), logit_len i32[B],
          intermediate (tuple of f32[B,T',V]), updates i32[B], the number of fast-weight updates of
          each utterance in each fast-weight layer, and stream, for the next segment.
        """
        c = self.config
        head = linear(c, c.ctc_vocab_size, "ctc_head")
        model = Model(c, name="model")
        x, length, intermediate, stream = model(mel, mel_len, train, head, stream)
        logits = head(x).astype(jnp.float32)
        return {
            "logits": logits,
            "logit_len": length,
            "intermediate": tuple(y.astype(jnp.float32) for y in intermediate),
            "updates": num_updates(c, mel_len),
            "stream": stream,
        }


def sharding(config):
    """Sharding rules of the parameters that `config` has: ((regex, mesh axes per dimension), ...).

    Every parameter is covered and no rule is dead. Heads of the fast weights and the wide sides of
    the projections go to `tensor`, the other side to `fsdp`.
    """
    layer, attn = r"model/layers_\d+", r"model/layers_\d+/attn"
    down, up = ("tensor", "fsdp"), ("fsdp", "tensor")
    rules = [
        (r"model/audio_feature_extractor/conv_layers_\d+/kernel", (None, *up)),
        (rf"{attn}/qkv/kernel", up),
        (rf"{attn}/o_proj/kernel", down),
        (rf"{layer}/mlp/(gate|up)_proj/kernel", up),
        (rf"{layer}/mlp/down_proj/kernel", down),
        (r"ctc_head/kernel", ("fsdp", None)),
    ]
    if config.qkv_bias:
        rules.append((rf"{attn}/qkv/bias", ("tensor",)))
    if config.any_lact:
        rules += [
            (rf"{attn}/w[012](/w_(left|right))?", ("tensor", "fsdp", None)),
            (rf"{attn}/qk_(scale|offset)", ()),
            (rf"{attn}/(lr_proj|momentum_proj_0|ttt_scale_proj)/kernel", ("fsdp", None)),
        ]
    if config.conv_kernel:
        rules += [
            (rf"{layer}/conv/pointwise_conv1/kernel", up),
            (rf"{layer}/conv/pointwise_conv2/kernel", down),
            (rf"{layer}/conv/depthwise_conv", ()),
        ]
    if config.self_conditioning and config.intermediate_ctc:
        rules.append((r"model/self_condition/kernel", (None, "fsdp")))
    return (*rules, (r"model/.*/(bias|scale)", ()))
