"""What a layer of the encoder has in the place of self-attention, by name.

Parameters of attention, under `self_attn`: linear_{q,k,v,out,pos}/{kernel,bias}, pos_bias_{u,v}
[N,H], and with global tokens of their own weights global_{q,k,v}.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jasr.layers.basic import Dropout, hash_uniform, record
from jasr.layers.relative_attention import (
    Plan,
    Reach,
    attention_with_global,
    make_plan,
    relative_attention,
    sinusoids,
)
from jasr.models.fastconformer.settings import FastConformerConfig
from jasr.models.fastconformer.subsampling import linear


@struct.dataclass
class Scene:
    """What the attention of all layers shares for a number of frames."""

    plan: Plan = struct.field(pytree_node=False)
    fixed: Reach | None = struct.field(pytree_node=False)  # None = drawn for this batch
    drawn: Reach | None
    positions: jax.Array | None  # `sinusoids` of the plan, [P,D]

    @property
    def reach(self):
        return self.drawn if self.fixed is None else self.fixed


class Attention(nn.Module):
    """Multi-head attention with relative, or without, positions: [B,T,D] -> [B,T,D]."""

    config: FastConformerConfig

    @nn.compact
    def __call__(self, x, length, scene, biases, train):
        """Args:
        x: [B,T,D]. length: i32[B]. scene: `Scene` of the T frames.
        biases: the position biases (u, w) f32[N,H] of layer 0 if the layers share them.
        """
        c = self.config

        def heads(x, name, use_bias=c.use_bias):  # [...,D] -> [N,...,H]
            x = linear(x, c.d_model, name, use_bias)
            return jnp.moveaxis(x.reshape(*x.shape[:-1], c.n_heads, c.head_dim), -2, 0)

        q, k, v = (heads(x, f"linear_{name}") for name in "qkv")
        options = dict(plan=scene.plan, reach=scene.reach, drop=self.dropout(train))
        if scene.positions is not None:
            if biases is None:
                biases = self.biases()
            options["relative"] = (heads(scene.positions, "linear_pos", False), *biases)
        if not c.global_tokens:
            out = relative_attention(q, k, v, length, **options)
        else:
            own = q, k, v
            if c.global_attn_separate:
                own = tuple(heads(x, f"global_{name}") for name in "qkv")
            chosen = np.arange(c.global_tokens) * c.global_tokens_spacing
            out = attention_with_global(q, k, v, own, length, chosen, **options)
        out = jnp.moveaxis(out, 0, 2).reshape(x.shape)
        return linear(out, c.d_model, "linear_out", c.use_bias)

    def biases(self):
        shape, zeros = (self.config.n_heads, self.config.head_dim), nn.initializers.zeros
        return tuple(self.param(f"pos_bias_{name}", zeros, shape) for name in "uv")

    def dropout(self, train):
        """(weights, number of the block) -> weights with dropout_att; None if there is none."""
        rate = self.config.dropout_att
        if not train or rate == 0:
            return None
        key = self.make_rng("dropout")

        def drop(weights, number):
            bits = hash_uniform(jax.random.fold_in(key, number), weights.shape)
            return jnp.where(bits >= jnp.uint32(rate * 2**32), weights / (1 - rate), 0)

        return drop


def attention_sharding(config, where):
    """Sharding rules of `Attention` at a regex of its path."""
    kernels = "linear_[qkv]" + "|global_[qkv]" * bool(config.global_attn_separate)
    return [
        (rf"{where}/({kernels})/kernel", ("fsdp", "tensor")),
        (rf"{where}/linear_out/kernel", ("tensor", "fsdp")),
    ] + [(rf"{where}/({kernels})/bias", ("tensor",))] * bool(config.use_bias)


def relative_sharding(config, where):
    """Those of `Attention` with relative positions."""
    return [
        *attention_sharding(config, where),
        (rf"{where}/linear_pos/kernel", ("fsdp", "tensor")),
        (rf"{where}/pos_bias_[uv]", ("tensor", None)),
    ]


def attention_scene(encoder, frames, drawn, train):
    """The `Scene` of T frames; the context is `drawn`, or the first one if that is None."""
    c = encoder.config
    fixed = reach(c, c.contexts[0]) if drawn is None else None
    return Scene(make_plan(frames, fixed, c.is_local), fixed, drawn, None)


def relative_scene(encoder, frames, drawn, train):
    """As `attention_scene`, with positions."""
    c, scene = encoder.config, attention_scene(encoder, frames, drawn, train)
    positions = sinusoids(*scene.plan.positions, c.d_model).astype(c.dtype)
    positions = Dropout(c.dropout_emb)(positions, train)
    if not encoder.has_variable("stages", "pos_emb"):  # it is that of the first layers
        record(encoder, "pos_emb", positions)
    return scene.replace(positions=positions)


def add_sinusoids(x):
    """The frames x [B,T,D] with absolute positions."""
    return x + sinusoids(x.shape[1] - 1, 0, x.shape[2])[::-1].astype(x.dtype)


def reach(config, context):
    """The `Reach` of a pair of the config's contexts."""
    left, right = context
    chunked = config.att_context_style == "chunked_limited" and right >= 0
    return Reach(left, right, right + 1 if chunked else 0)


class Mixer(NamedTuple):
    """How frames read each other: what a layer has in the place of self-attention.

    module: (its settings)(x [B,T,D], length i32[B], scene, shared biases or None, train) -> x.
    sharding: (its settings, regex of its path) -> rules of its parameters.
    scene: (the encoder, frames, drawn context or None, train) -> what the layers share.
    enter: the encoder's input x [B,T,D] -> the same with what the mixer must know of places.
    settings: the encoder's settings -> those of the mixer, a section of their own or all.
    """

    module: Any
    sharding: Callable
    scene: Callable
    enter: Callable = lambda x: x
    settings: Callable = lambda config: config


# By `self_attention_model`; a further one is a row here and a name in `settings.ATTENTION`.
MIXERS = {
    "rel_pos": Mixer(Attention, relative_sharding, relative_scene),
    "rel_pos_local_attn": Mixer(Attention, relative_sharding, relative_scene),
    "abs_pos": Mixer(Attention, attention_sharding, attention_scene, add_sinusoids),
}
