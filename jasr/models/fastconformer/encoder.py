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
    StackingSubsampling,
    linear,
    weights,
)


def layer_norm(config, name):
    return nn.LayerNorm(1e-5, config.dtype, use_fast_variance=False, name=name)


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
        affine, bare = kind != "instance_norm", kind.removeprefix("group_norm")
        norm = nn.GroupNorm(
            int(bare) if affine else x.shape[-1],
            epsilon=1e-5,
            use_scale=affine,
            use_bias=affine,
            use_fast_variance=False,
            name="batch_norm",
        )
        if mask is not None:
            # a row without frames has a mean, too
            mask = jnp.broadcast_to(mask.at[:, :1].set(True), x.shape)
        return norm(x.astype(jnp.float32), mask=mask)

    @nn.compact
    def __call__(self, x, mask, train):
        c = self.config

        def pointwise(x, features, name):
            kernel, bias = weights(name, (1, x.shape[-1], features), c.dtype, c.use_bias)
            y = x.reshape(-1, x.shape[-1]) @ kernel[0]  # one axis of rows, as in `linear`
            return (y if bias is None else y + bias).reshape(*x.shape[:-1], features)

        x, gate = jnp.split(pointwise(x, 2 * c.d_model, "pointwise_conv1"), 2, axis=-1)
        x = jnp.where(mask, x * jax.nn.sigmoid(gate), 0)
        shape = (c.conv_kernel_size, 1, c.d_model)
        kernel, bias = weights("depthwise_conv", shape, c.dtype, c.use_bias)
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
            sizes, masked = (factor, c.d_model, c.d_model), c.masked_subsampling
            return ConvSubsampling(False, *sizes, False, masked, name="reduction_enc")(x, length)
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
            sizes = c.subsampling_factor, c.conv_channels, c.d_model
            how = *sizes, c.causal_downsampling, c.masked_subsampling
            depthwise = c.subsampling == "dw_striding"
            return ConvSubsampling(depthwise, *how, name="pre_encode")(x, length)
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
    c, layer = config, rf"{prefix}layers_\d+"
    up, down = ("fsdp", "tensor"), ("tensor", "fsdp")
    conv, mixer = f"{layer}/conv", MIXERS[c.self_attention_model]
    rules = [
        (rf"{layer}/feed_forward[12]/linear1/kernel", up),
        (rf"{layer}/feed_forward[12]/linear2/kernel", down),
        (rf"{conv}/pointwise_conv1/kernel", (None, *up)),
        (rf"{conv}/pointwise_conv2/kernel", (None, *down)),
        (rf"{conv}/depthwise_conv/kernel", ()),
        *mixer.sharding(mixer.settings(c), f"{layer}/self_attn"),
    ]
    if c.use_bias:
        rules.append((rf"{layer}/(feed_forward[12]/linear1|conv/pointwise_conv1)/bias", up[1:]))
    convolutions = ["reduction_subsampling/reduction_enc"] if c.reduction == "striding" else []
    convolutions = convolutions if c.has_reduction else []
    if c.subsampling_factor == 1 or c.subsampling.startswith("stacking"):
        rules.append((rf"{prefix}pre_encode/(proj_out/)?kernel", up))
    else:
        convolutions.append("pre_encode")
    for where in convolutions:
        rules.append((rf"{prefix}{where}/conv_\d+/kernel", (None, None, None, "fsdp")))
        rules.append((rf"{prefix}{where}/out/kernel", up))
    if c.out_dim != c.d_model:
        rules.append((rf"{prefix}out_proj/kernel", ("fsdp", None)))
    return (*rules, (rf"{prefix}.*/(bias|scale)", ()))
