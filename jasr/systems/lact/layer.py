"""The LaCT layer: sliding-window attention and fast weights side by side (reference lact_llm's
LaCTSWIGLULayer, LaCT ASR's layer).

Parameter names are the original's: qkv, o_proj, q_norm, k_norm, w0, w1, w2 (or w0/w_left,
w0/w_right when low rank), lr_proj, qk_scale, qk_offset, ttt_norm, ttt_scale_proj, momentum_proj_0.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jasr.layers import fast_weights as fw
from jasr.layers.attention import rope, rotary_attention
from jasr.layers.basic import RMSNorm, Weights
from jasr.systems.lact.settings import LactConfig

# What ends a residual branch.
BRANCH_ENDS = ("o_proj", "down_proj", "pointwise_conv2")


def kernel_init(config, name=""):
    """N(0, initializer_range); where that is 0, N(0, 1/fan in), and 0 where a branch ends.

    Blocks that begin as the identity leave CTC's plateau of blanks sooner: on AN4, with one seed,
    the loss after 300 steps was 1.3 instead of 2.1.
    """
    if config.initializer_range:
        return nn.initializers.normal(config.initializer_range)
    if name in BRANCH_ENDS:
        return nn.initializers.zeros
    return nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def linear(config, features, name, use_bias=False):
    init = kernel_init(config, name)
    return nn.Dense(features, use_bias=use_bias, name=name, kernel_init=init, dtype=config.dtype)


class LowRank(nn.Module):
    """Initial fast weights f32[H,M,K] = w_left w_right + I/2 (rectangular identity)."""

    heads: int
    rows: int
    columns: int
    rank: int
    gain: float

    @nn.compact
    def __call__(self):
        normal, gain = nn.initializers.normal, self.gain
        left, right = (self.heads, self.rows, self.rank), (self.heads, self.rank, self.columns)
        left = self.param("w_left", normal(gain / self.rank**0.5), left)
        right = self.param("w_right", normal(gain / self.columns**0.5), right)
        return left @ right + 0.5 * jnp.eye(self.rows, self.columns)


def heads(x, num):
    """[B,T,D] -> [B,T,num,D/num]."""
    return x.reshape(*x.shape[:2], num, x.shape[2] // num)


def arguments(config, scale, offset, tokens):
    """Queries, keys and values of the fast weights, [B,H,L,d].

    Args:
      scale, offset: f32[D,2], of queries and keys.
      tokens: the projections [B,1,L,3D] and the rows of `rope_table` [1,1,L,.], two of them.
    """
    c, nh = config, config.num_lact_heads
    qkv, *table = (y[:, 0] for y in tokens)
    q, k, v = jnp.split(qkv, 3, axis=-1)
    q = q * scale[:, 0] + offset[:, 0]
    k = k * scale[:, 1] + offset[:, 1]
    if c.qkv_silu:
        q, k = jax.nn.silu(q), jax.nn.silu(k)
        v = v if c.no_v_silu else jax.nn.silu(v)
    q, k = fw.l2_normalise(heads(q, nh)), fw.l2_normalise(heads(k, nh))
    if not c.ttt_nope:  # the attention's rotation, by the attention's heads, after the norm
        table = [t[0] for t in table]
        q, k = (
            rope(y.reshape(*y.shape[:2], c.num_attn_heads, c.head_dim), table).reshape(y.shape)
            for y in (q, k)
        )
    return tuple(y.astype(c.dtype).transpose(0, 2, 1, 3) for y in (q, k, heads(v, nh)))


def _where_rows(rows, x, y):
    """x in the rows bool[B], y in the others."""
    return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def fast_state(config, batch):
    """The fw.State with which a stream of `batch` rows is made: zeros, which rows that begin anew
    replace by the initial weights."""
    c, dim = config, config.fast_head_dim
    hidden, wide = int(dim * c.inter_multi), (c.num_lact_heads,)
    w0, w1 = jnp.zeros((*wide, hidden, dim)), jnp.zeros((*wide, dim, hidden))
    made = jax.eval_shape(lambda: fw.start(fw.FastWeights(w0, w1, w0), batch=batch))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)


class LactLayer(nn.Module):
    """Attention + fast weights over one sequence, [B,T,D] -> [B,T,D].

    A recording that comes in segments carries its fast weights along: see `fast_state`.
    """

    config: LactConfig
    fast: bool = True

    @nn.compact
    def __call__(self, x, length, table, stream=None):
        """(out [B,T,D], what the next segment begins with).

        Args:
          x: [B,T,D] already normed. length: i32[B] valid frames. table: `rope_table` of T frames.
          stream: (bool[B] rows that begin anew, the fw.State of the segment before); None: this is
            all there is, and None comes back.
        """
        c = self.config
        frames = x.shape[1]
        fast = self.fast and (c.lact_updates != "no_branch" or self.is_initializing())
        qkv = linear(c, 3 * c.hidden_size, "qkv", c.qkv_bias)(x)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        if c.attn_qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
            qkv = jnp.concatenate([q, k, v], axis=-1)
        block = c.lact_chunk_size if c.lact_mode == "block" else 0
        out = rotary_attention(
            qkv.reshape(*x.shape[:2], 3, c.num_attn_heads, c.head_dim),
            table,
            causal=c.causal,
            window=c.window_size,
            chunk=block,
            key_len=length if block or not c.causal else None,
        ).reshape(x.shape)
        after = stream and stream[1]
        if fast:
            valid = jnp.arange(frames) < length[:, None]
            branch, after = self.fast_branch(x, qkv, valid, table, stream)
            if c.lact_updates != "no_branch":
                out = out + branch
        out = linear(c, c.hidden_size, "o_proj")(out)
        return out, after

    def initial_weights(self):
        """w0, w1, w2 f32[H,..] in out_in layout; w0 and w2 low rank if the config says so."""
        c = self.config
        dim = c.fast_head_dim
        hidden = int(dim * c.inter_multi)
        nh = c.num_lact_heads
        normal = nn.initializers.normal
        w1 = self.param("w1", normal(hidden**-0.5), (nh, dim, hidden))
        if c.w0_w2_low_rank > 0:
            w0, w2 = (
                LowRank(nh, hidden, dim, c.w0_w2_low_rank, c.fw_init_gain, name=n)()
                for n in ("w0", "w2")
            )
        else:
            w0, w2 = (self.param(n, normal(dim**-0.5), (nh, hidden, dim)) for n in ("w0", "w2"))
        return fw.FastWeights(w0, w1, w2)

    def token_rates(self, x):
        """lr f32[B,H,T,3], momentum f32[B,H,T,1] or None, output scale f32[B,T,H,1] or None: one
        f32 product for the three."""
        c = self.config
        nh = c.num_lact_heads
        wide = {"lr_proj": 3 * nh}
        wide |= {"momentum_proj_0": nh} if c.use_momentum else {}
        wide |= {"ttt_scale_proj": nh} if c.learnable_ttt_scale else {}
        parts = [
            Weights((c.hidden_size, size), kernel_init(c), name=name)()
            for name, size in wide.items()
        ]
        kernel, bias = (jnp.concatenate(p, axis=-1) for p in zip(*parts, strict=True))
        y = jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST) + bias
        # head-major: (w0, w1, w2) rates of head 0, then of head 1, ...
        lr = jax.nn.softplus(y[..., : 3 * nh] + fw.softplus_inverse(c.fw_base_lr))
        lr = lr.reshape(*lr.shape[:2], nh, 3).transpose(0, 2, 1, 3)
        momentum = scale = None
        if c.use_momentum:
            momentum = jax.nn.sigmoid(y[..., 3 * nh : 4 * nh]).transpose(0, 2, 1)[..., None]
        if c.learnable_ttt_scale:
            scale = jax.nn.silu(y[..., -nh:])[..., None]
        return lr, momentum, scale

    def fast_branch(self, x, qkv, valid, table, stream):
        """(what the fast weights read out [B,T,D], their state after it or None)."""
        c = self.config
        scale = self.param("qk_scale", nn.initializers.ones, (c.hidden_size, 2))
        offset = self.param("qk_offset", nn.initializers.zeros, (c.hidden_size, 2))
        tokens = (qkv[:, None], *(t[None, None] for t in table))
        prepare = functools.partial(arguments, c, scale, offset)
        lr, momentum, gate = self.token_rates(x)
        out, after = self.run(tokens, prepare, lr, momentum, valid, stream)
        out = out.transpose(0, 2, 1, 3)
        out = nn.remat(RMSNorm)(name="ttt_norm")(out)
        if gate is not None:
            out = out * gate
        return out.reshape(x.shape).astype(c.dtype), after

    def run(self, tokens, prepare, lr, momentum, valid, stream):
        """The operator that the mode asks for: (out f32[B,H,T,V], state); prepare(tokens) is
        (q, k, v). In a stream the last chunk is learnt from as well."""
        c = self.config
        rule = fw.Rule(muon=fw.MUON_TUNED if c.use_muon else None, prenorm=c.ttt_prenorm)
        state = fw.start(self.initial_weights(), rule, batch=lr.shape[0])
        keep = stream is not None
        if keep:
            state = jax.tree.map(functools.partial(_where_rows, stream[0]), state, stream[1])
        options = dict(rule=rule, momentum=momentum)
        if c.lact_updates == "off":
            state, out = fw.apply_only(state, jax.checkpoint(prepare)(tokens)[0])
        elif c.lact_mode == "bidirectional":
            state, out = fw.full(state, *jax.checkpoint(prepare)(tokens), lr, mask=valid, **options)
        elif c.lact_mode == "block":
            options |= dict(chunk=c.lact_chunk_size, prepare=prepare)
            state, out = fw.block_causal(state, tokens, None, None, lr, mask=valid, **options)
        else:  # right padding cannot reach a valid frame in this order: a mask is for the state
            options |= dict(chunk=c.lact_chunk_size, update_last=keep, prepare=prepare)
            mask = valid if keep else None
            state, out = fw.shifted(state, tokens, None, None, lr, mask=mask, **options)
        return out, state if keep else None
