"""FastConformer: NeMo's ConformerEncoder, log-mel frames to encoder frames.

Every parameter keeps NeMo's name, with dots as slashes and list indices joined by "_":

    pre_encode/...                                                  see subsampling.py
    layers_{n}/{norm_feed_forward1,norm_self_att,norm_conv,norm_feed_forward2,norm_out}/{scale,bias}
    layers_{n}/feed_forward{1,2}/linear{1,2}/{kernel,bias}
    layers_{n}/self_attn/linear_{q,k,v,out,pos}/{kernel,bias}, pos_bias_{u,v} [N,H]
    layers_{n}/conv/{pointwise_conv1,depthwise_conv,pointwise_conv2}/{kernel [W,in/groups,out],bias}
    layers_{n}/conv/batch_norm/{scale,bias}       whatever the kind of norm; batch_stats: {mean,var}
    out_proj/{kernel,bias}, reduction_subsampling/reduction_enc/...

Tied position biases (untie_biases false) are layer 0's alone.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jasr.layers.basic import BatchNorm, Dropout, depthwise, frame_mask, record
from jasr.layers.relative_attention import Reach
from jasr.models.fastconformer.mixers import MIXERS, reach
from jasr.models.fastconformer.settings import (  # noqa: F401  (the model's public names)
    FastConformerConfig,
    output_lengths,
    reduced_lengths,
    subsampled_lengths,
)
from jasr.models.fastconformer.subsampling import (
    ConvSubsampling,
    ConvWeights,
    StackingSubsampling,
    linear,
)


def layer_norm(config, name):
    return nn.LayerNorm(1e-5, config.dtype, use_fast_variance=False, name=name)


class GroupNorm(nn.Module):
    """x [B,T,C] normalised over the frames and over C / groups channels, f32, for each utterance.

    affine False has no parameters (with groups = C: torch's instance norm).
    """

    groups: int
    affine: bool

    @nn.compact
    def __call__(self, x, mask):
        """mask: bool[B,T,1] of the frames that count, or None for all."""
        batch, frames, channels = x.shape
        x = x.astype(jnp.float32)
        weight = jnp.ones((batch, frames, 1)) if mask is None else mask.astype(jnp.float32)
        count = jnp.maximum(jnp.sum(weight, axis=1), 1)  # [B,1]

        def mean(y):  # [B,T,C] -> [B,1,C], the same within a group
            y = jnp.sum(y * weight, axis=1) / count
            y = jnp.mean(y.reshape(batch, self.groups, -1), axis=-1)
            return jnp.repeat(y, channels // self.groups, axis=-1)[:, None]

        x = x - mean(x)
        x = x * jax.lax.rsqrt(mean(jnp.square(x)) + 1e-5)
        if not self.affine:
            return x
        scale = self.param("scale", nn.initializers.ones, (channels,))
        return x * scale + self.param("bias", nn.initializers.zeros, (channels,))


class FeedForward(nn.Module):
    config: FastConformerConfig

    @nn.compact
    def __call__(self, x, train):
        c = self.config
        x = linear(x, c.d_model * c.ff_expansion_factor, "linear1", c.use_bias)
        x = Dropout(c.dropout)(jax.nn.silu(x), train)
        return linear(x, c.d_model, "linear2", c.use_bias)


class Convolution(nn.Module):
    """Pointwise, gate, depthwise over time, norm, SiLU, pointwise; reads no padding."""

    config: FastConformerConfig

    def norm(self, x, mask, train):
        kind = self.config.conv_norm_type
        mask = None if self.config.padding_counts else mask
        if kind == "layer_norm":
            return layer_norm(self.config, "batch_norm")(x)
        if kind == "batch_norm":
            return BatchNorm(name="batch_norm")(x, mask, train)
        groups = x.shape[-1] if kind == "instance_norm" else int(kind.removeprefix("group_norm"))
        return GroupNorm(groups, kind != "instance_norm", name="batch_norm")(x, mask)

    @nn.compact
    def __call__(self, x, mask, train):
        c = self.config

        def weights(name, *shape):
            return ConvWeights(shape, c.dtype, c.use_bias, name=name)()

        def pointwise(x, features, name):
            kernel, bias = weights(name, 1, x.shape[-1], features)
            y = x.reshape(-1, x.shape[-1]) @ kernel[0]  # one axis of rows, as in `linear`
            return (y if bias is None else y + bias).reshape(*x.shape[:-1], features)

        x, gate = jnp.split(pointwise(x, 2 * c.d_model, "pointwise_conv1"), 2, axis=-1)
        x = jnp.where(mask, x * jax.nn.sigmoid(gate), 0)
        kernel, bias = weights("depthwise_conv", c.conv_kernel_size, 1, c.d_model)
        x = depthwise(x, kernel[:, 0], c.conv_context[0])
        x = x if bias is None else x + bias
        x = jax.nn.silu(self.norm(x, mask, train)).astype(c.dtype)
        return pointwise(x, c.d_model, "pointwise_conv2")


class Layer(nn.Module):
    """A Conformer layer: half a feed-forward, mixer, convolution, half a feed-forward, norm."""

    config: FastConformerConfig

    @nn.compact
    def __call__(self, x, length, scene, biases, train):
        c = self.config

        def drop(x):
            return Dropout(c.dropout)(x, train)

        y = FeedForward(c, name="feed_forward1")(layer_norm(c, "norm_feed_forward1")(x), train)
        record(self, "ff1_out", y)
        x = x + 0.5 * drop(y)
        y = layer_norm(c, "norm_self_att")(x)
        mixer = MIXERS[c.self_attention_model]
        y = mixer.module(mixer.settings(c), name="self_attn")(y, length, scene, biases, train)
        record(self, "attn_out", y)
        x = x + drop(y)
        mask = frame_mask(length, x.shape[1])
        y = Convolution(c, name="conv")(layer_norm(c, "norm_conv")(x), mask, train)
        record(self, "conv_out", y)
        x = x + drop(y)
        y = FeedForward(c, name="feed_forward2")(layer_norm(c, "norm_feed_forward2")(x), train)
        record(self, "ff2_out", y)
        x = x + 0.5 * drop(y)
        x = layer_norm(c, "norm_out")(x)
        record(self, "out", x)
        return x


class Reduction(nn.Module):
    """Fewer frames in the middle of the encoder: a convolution, or the largest of every few."""

    config: FastConformerConfig

    @nn.compact
    def __call__(self, x, length):
        c = self.config
        factor = c.reduction_factor
        if c.reduction == "striding":
            make = ConvSubsampling(
                False,
                factor,
                c.d_model,
                c.d_model,
                False,
                c.masked_subsampling,
                name="reduction_enc",
            )
            return make(x, length)
        whole = x.shape[1] // factor * factor
        # one by one: the gradient of jnp.max is NaN where XLA computes x twice, a bit differently
        x = functools.reduce(jnp.maximum, [x[:, i:whole:factor] for i in range(factor)])
        return x, reduced_lengths(c, length)


class FastConformer(nn.Module):
    """The encoder. Variables: params, batch_stats (batch norm only); rngs: dropout (training)."""

    config: FastConformerConfig = FastConformerConfig()

    @nn.compact
    def __call__(self, mel, mel_len, train=False):
        """Encoder frames of a batch of log-mel frames.

        Args:
          mel: f32[B,T,F]. mel_len: i32[B] valid frames; what lies beyond has no effect with
          `masked_subsampling` (in training with batch norm only if not `padding_counts`).
          train: batch statistics, dropout, skipped layers; batch_stats must then be mutable.

        Returns:
          (frames [B,T',D] in the compute dtype, their lengths i32[B]). Frames beyond the length
          are finite and mean nothing.
        """
        c = self.config
        x, length = self.subsample(mel.astype(c.dtype), mel_len)
        record(self, "pre_encode_out", x)
        if c.xscaling:
            x = x * jnp.asarray(c.d_model**0.5, x.dtype)
        mixer = MIXERS[c.self_attention_model]
        x = mixer.enter(x)
        x = Dropout(c.dropout if c.is_local else c.dropout_pre_encoder)(x, train)
        record(self, "pos_enc", x)
        drawn = self.drawreach() if train and len(c.contexts) > 1 else None
        scene = mixer.scene(self, x.shape[1], drawn, train)
        make = nn.remat(Layer, static_argnums=(5,)) if c.remat else Layer
        biases = None
        for n in range(c.n_layers):
            y = make(c, name=f"layers_{n}")(x, length, scene, biases, train)
            x = self.skip(x, y, c.drop_layer(n)) if train else y
            if n == 0 and c.tied_biases:
                own = self.variables["params"]["layers_0"]["self_attn"]
                biases = own["pos_bias_u"], own["pos_bias_v"]
            if c.has_reduction and n == c.reduction_position:
                x, length = Reduction(c, name="reduction_subsampling")(x, length)
                scene = mixer.scene(self, x.shape[1], drawn, train)
        if c.out_dim != c.d_model:
            x = linear(x, c.out_dim, "out_proj")
        if c.has_reduction and c.reduction_position == -1:
            x, length = Reduction(c, name="reduction_subsampling")(x, length)
        record(self, "encoded", x)
        return x, length

    def subsample(self, x, length):
        """(frames [B,T',D], lengths) of pre_encode."""
        c = self.config
        if c.subsampling_factor > 1 and not c.subsampling.startswith("stacking"):
            make = ConvSubsampling(
                c.subsampling == "dw_striding",
                c.subsampling_factor,
                c.conv_channels,
                c.d_model,
                c.causal_downsampling,
                c.masked_subsampling,
                name="pre_encode",
            )
            return make(x, length)
        after = subsampled_lengths(c, length, x.shape[1])
        if c.masked_subsampling:  # NeMo's features are zero there
            x = jnp.where(frame_mask(length, x.shape[1]), x, 0)
        if c.subsampling_factor == 1:
            return linear(x, c.d_model, "pre_encode"), after
        norm = c.subsampling == "stacking_norm"
        make = StackingSubsampling(c.subsampling_factor, c.d_model, norm, name="pre_encode")
        return make(x), after

    def drawreach(self):
        """One of the config's contexts, drawn for the whole batch; a `Reach` of i32[]."""
        reaches = jnp.asarray([reach(self.config, context) for context in self.config.contexts])
        probs = jnp.asarray(self.config.context_probs)
        choice = jax.random.choice(self.make_rng("dropout"), len(reaches), p=probs)
        return Reach(*reaches[choice])

    def skip(self, before, after, probability):
        """A layer's output, or with some probability its input (stochastic depth)."""
        if probability == 0:
            return after
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - probability)
        return before + jnp.where(keep, (after - before) / (1 - probability), 0)


def sharding(config, prefix="encoder/"):
    """Sharding rules of the parameters that `config` has: ((regex, mesh axes per dimension), ...).

    Every parameter is covered and no rule is dead. Heads and the wide sides of the projections go
    to `tensor`, the other side to `fsdp`. prefix: regex of the path before the encoder's names.
    """
    c = config
    layer = rf"{prefix}layers_\d+"
    up, down = ("fsdp", "tensor"), ("tensor", "fsdp")
    conv, mixer = f"{layer}/conv", MIXERS[c.self_attention_model]
    rules = [
        (rf"{layer}/feed_forward[12]/linear1/kernel", up),
        (rf"{layer}/feed_forward[12]/linear2/kernel", down),
        (rf"{conv}/pointwise_conv1/kernel", (None, *up)),
        (rf"{conv}/pointwise_conv2/kernel", (None, *down)),
        (rf"{conv}/depthwise_conv/kernel", ()),
        (rf"{layer}/norm_\w+/(scale|bias)", ()),
        *mixer.sharding(mixer.settings(c), f"{layer}/self_attn"),
    ]
    if c.use_bias:
        rules += [
            (rf"{layer}/feed_forward[12]/linear1/bias", ("tensor",)),
            (rf"{layer}/feed_forward[12]/linear2/bias", ()),
            (rf"{conv}/pointwise_conv1/bias", ("tensor",)),
            (rf"{conv}/(depthwise_conv|pointwise_conv2)/bias", ()),
        ]
    if c.conv_norm_type != "instance_norm":
        rules.append((rf"{conv}/batch_norm/(scale|bias)", ()))
    if c.subsampling_factor == 1:
        rules += [(rf"{prefix}pre_encode/kernel", up), (rf"{prefix}pre_encode/bias", ())]
    elif c.subsampling.startswith("stacking"):
        rules.append((rf"{prefix}pre_encode/proj_out/kernel", up))
        rules.append((rf"{prefix}pre_encode/proj_out/bias", ()))
        if c.subsampling == "stacking_norm":
            rules.append((rf"{prefix}pre_encode/pre_norm/(scale|bias)", ()))
    else:
        rules += _conv_rules(f"{prefix}pre_encode")
    if c.has_reduction and c.reduction == "striding":
        rules += _conv_rules(f"{prefix}reduction_subsampling/reduction_enc")
    if c.out_dim != c.d_model:
        rules += [(rf"{prefix}out_proj/kernel", ("fsdp", None)), (rf"{prefix}out_proj/bias", ())]
    return tuple(rules)


def _conv_rules(where):
    return [
        (rf"{where}/conv_\d+/kernel", (None, None, None, "fsdp")),
        (rf"{where}/(conv_\d+|out)/bias", ()),
        (rf"{where}/out/kernel", ("fsdp", "tensor")),
    ]
