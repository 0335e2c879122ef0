"""LaCT's fast weights: a SwiGLU whose weights are updated while it reads a sequence (pure
functions of arrays).

The fast-weight function of a head is f(x) = w1 (silu(w0 x) * (w2 x)) and its inner loss -<f(k),
v>, so the ascent directions of one chunk have a closed form
(paper arXiv 2505.23884, Algorithm 1 and Appendix A; reference lact_llm/ttt_operation.py and
lact_nvs). Everything here keeps batch B and head H as separate axes and uses the reference's
"out_in" layout: w0, w2 [B,H,M,K], w1 [B,H,V,M]; `transpose` turns lact_nvs's "in_out" layout into
it and back.

    shifted       apply, then update, chunk by chunk; the last chunk is only applied (causal when a
                  window >= chunk sits beside it)
    block_causal  update, then apply, chunk by chunk
    full          one update on everything, then apply (bidirectional)
    apply_only    no update
    run_order     any list of (start, end, update, apply), as lact_nvs has it (`strided_order`)

An update adds the (momentum-smoothed, optionally orthogonalised) direction and restores the norm
that each row of the initial weight had. Fast weights, norms, rates and momentum stay f32 whatever
the dtype of q, k and v.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jasr.layers.newton_schulz import MUON_TUNED, guarded_norm, muon_constant, newton_schulz  # noqa: F401  (part of this module's face)

# What a rematerialised chunk step keeps: the results of its products, but for the gate and up
# products, which are the largest, and on accelerators for Muon's Gram matrices. The rest is
# elementwise and recomputed.
KEPT = ("back", "delta", "iterate")
KEPT_ON_CPU = (*KEPT, "gram")


class FastWeights(NamedTuple):
    """Fast weights or anything of their shape: w0, w2 f32[B,H,M,K] (gate and up), w1 f32[B,H,V,M]
    (down)."""

    w0: jax.Array
    w1: jax.Array
    w2: jax.Array


class State(NamedTuple):
    """What a stream carries from chunk to chunk.

    w: weights that are read and differentiated. main: the un-normalised sum of pre-norm updates
    (equal to w for post-norm). momentum: zero at the start. norm: row norms of the initial
    weights, f32[B,H,M,1], [B,H,V,1], [B,H,M,1].
    """

    w: FastWeights
    main: FastWeights
    momentum: FastWeights
    norm: FastWeights


class Rule(NamedTuple):
    """How a chunk changes the weights. Hashable, so that it can be a static argument.

    muon: None for plain gradient steps, () for Frobenius normalisation only, else one (a, b, c)
    triple per Newton-Schulz step. prenorm: accumulate un-normalised, read normalised. detach_norm:
    no gradient through the initial norms (lact_nvs).
    """

    muon: tuple | None = None
    prenorm: bool = False
    detach_norm: bool = False


PLAIN = Rule()


def transpose(w):
    """The same weights in the other layout: out_in <-> in_out (lact_nvs: w0, w2 [.., K, M], w1
    [.., M, V])."""
    return FastWeights(*(jnp.matrix_transpose(x) for x in w))


def l2_normalise(x, eps=1e-5):
    """x / (|x| + eps) over the last axis, in f32 (the reference's l2_norm)."""
    x = x.astype(jnp.float32)
    return x / (guarded_norm(x) + eps)


def softplus_inverse(rate):
    """c with softplus(c) = rate: the constant that is added to every learning-rate logit. A Python
    float, not a parameter."""
    return rate + math.log(-math.expm1(-rate))


def orthogonalise(g, coefficients):
    """`newton_schulz` of w0, w1 and w2 each on its own, in one stacked iteration where the shapes
    allow it."""
    if g.w0.shape[-1] == g.w1.shape[-2]:
        x = newton_schulz(jnp.stack([g.w0, g.w1.mT, g.w2], axis=2), coefficients)
        return FastWeights(x[:, :, 0], x[:, :, 1].mT, x[:, :, 2])
    x = newton_schulz(jnp.stack([g.w0, g.w2], axis=2), coefficients)
    return FastWeights(x[:, :, 0], newton_schulz(g.w1, coefficients), x[:, :, 1])


def start(w, rule=PLAIN, batch=None):
    """State before the first chunk. w: FastWeights [B,H,..], or [H,..] that are repeated for
    `batch` rows."""
    w = FastWeights(*(x.astype(jnp.float32) for x in w))
    if batch is not None:
        w = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), w)
    norm = jax.tree.map(guarded_norm, w)
    if rule.detach_norm:
        norm = jax.lax.stop_gradient(norm)
    return State(w, w, jax.tree.map(jnp.zeros_like, w), norm)


def _product(equation, x, y):
    """einsum of operands of x's dtype, accumulated in f32."""
    return jnp.einsum(equation, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


def _hidden(w, x):
    """Gate and up pre-activations of x [B,H,L,K] in one product: two f32[B,H,L,M]."""
    both = jnp.concatenate([w.w0, w.w2], axis=2)
    return jnp.split(_product("bhlk,bhmk->bhlm", x, both), 2, axis=-1)


def _read(w, gate, up, dtype):
    """f_w from its pre-activations: f32[B,H,L,V]."""
    return _product("bhlm,bhvm->bhlv", (jax.nn.silu(gate) * up).astype(dtype), w.w1)


def apply(w, q):
    """f_w(q): f32[B,H,L,V] for q [B,H,L,K]."""
    gate, up = _hidden(w, q)
    return _read(w, gate, up, q.dtype)


def _direction(w, gate, up, k, v, lr):
    """Ascent direction of sum_i lr_i <f(k_i), v_i>, k, v [B,H,L,..] and lr f32[B,H,L,3], from the
    pre-activations of k: FastWeights f32[B,H,..]."""
    lr0, lr1, lr2 = lr[..., 0:1], lr[..., 1:2], lr[..., 2:3]
    s = jax.nn.sigmoid(gate)
    silu = gate * s
    back = checkpoint_name(_product("bhlv,bhvm->bhlm", v, w.w1), "back")
    d_gate = lr0 * back * up * s * (1 + gate * (1 - s))
    d_up = lr2 * back * silu
    both = jnp.concatenate([d_gate, d_up], axis=-1).astype(k.dtype)
    d02 = checkpoint_name(_product("bhlm,bhlk->bhmk", both, k), "delta")
    d1 = checkpoint_name(_product("bhlv,bhlm->bhvm", v, lr1 * silu * up), "delta")
    d0, d2 = jnp.split(d02, 2, axis=2)
    return FastWeights(d0, d1, d2)


def advance(state, delta, rule, beta=None, alive=None):
    """The state after one chunk.

    delta: `_direction` of the chunk. beta: f32[B,H,1,1] momentum of the chunk, or None for none.
    alive: bool[B,1,1,1], False where the chunk held no valid frame: there nothing changes,
    momentum included.
    """
    momentum = state.momentum
    if beta is not None:
        delta = momentum = jax.tree.map(lambda d, m: d + beta * m, delta, momentum)
    if rule.muon is not None:
        delta = orthogonalise(delta, rule.muon)
    main = jax.tree.map(jnp.add, state.main if rule.prenorm else state.w, delta)
    w = jax.tree.map(lambda m, n: m / (guarded_norm(m) + 1e-5) * n, main, state.norm)
    new = State(w, main if rule.prenorm else w, momentum, state.norm)
    return new if alive is None else jax.tree.map(functools.partial(jnp.where, alive), new, state)


def _valid(k, v, lr, momentum, mask):
    """(k, v, lr, beta, alive): keys, values and rates that are zero on pads, the chunk's mean
    momentum over valid frames [B,H,1,1] or None, and whether any frame is valid.

    A pad may hold NaN, and a rate of 0 times NaN is NaN.
    """
    lr, beta = lr.astype(jnp.float32), None
    if mask is None:
        if momentum is not None:
            beta = jnp.mean(momentum.astype(jnp.float32), axis=2, keepdims=True)
        return k, v, lr, beta, None
    m = mask[:, None, :, None]
    count = jnp.sum(m.astype(jnp.float32), axis=2, keepdims=True)
    if momentum is not None:
        kept = jnp.where(m, momentum.astype(jnp.float32), 0.0)
        beta = jnp.sum(kept, axis=2, keepdims=True) / jnp.maximum(count, 1)
    return *(jnp.where(m, x, 0) for x in (k, v, lr)), beta, count > 0


def update(state, k, v, lr, rule, momentum=None, mask=None):
    """The state after one update on all of k, v; arguments as `shifted`'s."""
    k, v, lr, beta, alive = _valid(k, v, lr, momentum, mask)
    delta = _direction(state.w, *_hidden(state.w, k), k, v, lr)
    return advance(state, delta, rule, beta, alive)


def _apply_then_update(state, q, k, v, lr, rule, momentum, mask):
    """One shifted chunk: q and k go through the same weights, so their rows share one product."""
    k, v, lr, beta, alive = _valid(k, v, lr, momentum, mask)
    gate, up = _hidden(state.w, jnp.concatenate([q, k], axis=2))
    n = q.shape[2]
    out = _read(state.w, gate[:, :, :n], up[:, :, :n], q.dtype)
    delta = _direction(state.w, gate[:, :, n:], up[:, :, n:], k, v, lr)
    return advance(state, delta, rule, beta, alive), out


def _update_then_apply(state, q, k, v, lr, rule, momentum, mask):
    state = update(state, k, v, lr, rule, momentum, mask)
    return state, apply(state.w, q)


class _Tokens(NamedTuple):
    """What a sequence is cut into chunks of; axis 2 is time (axis 1 of the mask)."""

    tokens: Any  # what `prepare` takes
    lr: jax.Array
    momentum: jax.Array | None
    mask: jax.Array | None

    def map(self, cut):
        """Every array x as cut(x, axis of time)."""
        timed = jax.tree.map(lambda x: cut(x, 2), self._replace(mask=None))
        return timed._replace(mask=None if self.mask is None else cut(self.mask, 1))

    def part(self, begin, end=None):
        """The tokens from `begin` up to `end`."""
        return self.map(lambda x, axis: x[(slice(None),) * axis + (slice(begin, end),)])


def _run(step, last_step, count, state, q, k, v, lr, chunk, rule, momentum, mask, prepare):
    """`step` over `count` whole chunks and `last_step` over what is left: the state and the
    outputs."""
    if prepare is None:
        q, prepare = (q, k, v), lambda tokens: tokens
    elif k is not None or v is not None:
        raise ValueError("with prepare, q holds all that a chunk is made of: k and v must be None")
    tokens, outs = _Tokens(q, lr, momentum, mask), []
    if count > 0:
        state, out = _scan_chunks(step, prepare, state, tokens, count, chunk, rule)
        outs.append(out)
    if count * chunk < lr.shape[2] or not outs:
        last = tokens.part(count * chunk)
        q, k, v = jax.checkpoint(prepare)(last.tokens)
        state, out = last_step(state, q, k, v, last.lr, rule, last.momentum, last.mask)
        outs.append(out)
    return state, outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=2)


def _scan_chunks(step, prepare, state, tokens, count, chunk, rule):
    """Scan `step` over `count` chunks of `tokens`.

    Returns the state and out [B,H,count*chunk,V]. Only what changes is carried; each step is
    rematerialised but for what KEPT names.
    """
    has_momentum = tokens.momentum is not None

    def split(x, axis):
        x = jax.lax.slice_in_dim(x, 0, count * chunk, axis=axis)
        x = x.reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def pack(s):
        return s.w, s.main if rule.prenorm else None, s.momentum if has_momentum else None

    def unpack(carry):
        w, main, momentum = carry
        return State(w, main or w, momentum or state.momentum, state.norm)

    kept = KEPT_ON_CPU if jax.default_backend() == "cpu" else KEPT
    policy = jax.checkpoint_policies.save_only_these_names(*kept)

    @functools.partial(jax.checkpoint, policy=policy)
    def body(carry, part):
        q, k, v = prepare(part.tokens)
        new, out = step(unpack(carry), q, k, v, part.lr, rule, part.momentum, part.mask)
        return pack(new), out

    carry, out = jax.lax.scan(body, pack(state), tokens.map(split))
    out = jnp.moveaxis(out, 0, 2)
    return unpack(carry), out.reshape(*out.shape[:2], count * chunk, out.shape[-1])


def shifted(
    state, q, k, v, lr, *, chunk, rule=PLAIN, momentum=None, mask=None, update_last=False,
    prepare=None,
):  # fmt: skip
    """Apply-then-update over chunks ("shifted block-causal"): the state and out
    f32[B,H,L,V].

    A token reads weights made from earlier chunks only. The last chunk (1..chunk tokens) is
    applied and not learnt from, so a sequence of L tokens makes ceil(L / chunk) - 1 updates, none
    at all when L <= chunk.

    Args:
      state: `State`, from `start` or from an earlier call.
      q, k: [B,H,L,K], normalised by the caller. v: [B,H,L,V]. Their dtype is the GEMMs' dtype.
      lr: f32[B,H,L,3], rates of (w0, w1, w2). momentum: f32[B,H,L,1] in (0, 1), or None.
      mask: bool[B,L], True = valid; None when all tokens are.
      update_last: also learn from the last chunk, so that the returned state continues the stream
      at a chunk boundary.
      prepare: a function that makes (q, k, v) of a chunk. q is then what it takes, any tree of
      arrays with L in axis 2, and k and v are None. The backward pass prepares each chunk again,
      so that the prepared arrays never exist as a whole.
    """
    count = max(-(-lr.shape[2] // chunk) - 1, 0)
    last = _apply_then_update if update_last else apply_only
    rest = chunk, rule, momentum, mask, prepare
    return _run(_apply_then_update, last, count, state, q, k, v, lr, *rest)


def block_causal(state, q, k, v, lr, *, chunk, rule=PLAIN, momentum=None, mask=None, prepare=None):
    """Update-then-apply over chunks: a token reads weights made from its own chunk and the earlier
    ones. As `shifted`."""
    count, rest = lr.shape[2] // chunk, (chunk, rule, momentum, mask, prepare)
    return _run(_update_then_apply, _update_then_apply, count, state, q, k, v, lr, *rest)


def full(state, q, k, v, lr, *, rule=PLAIN, momentum=None, mask=None):
    """One update on all valid tokens, then apply to all of them (bidirectional; lact_nvs
    "reconstruct"). As `shifted`."""
    return _update_then_apply(state, q, k, v, lr, rule, momentum, mask)


def apply_only(state, q, *_):
    """The state unchanged and f_w(q): fast weights frozen at whatever the state holds."""
    return state, apply(state.w, q)


def strided_order(length, stride, update_tokens, first=0):
    """Entries of lact_ar_video's order: the first span with initial weights, then per stride learn
    from its first tokens only."""
    order = [(0, first, False, True)] if first else []
    for begin in range(first, length, stride):
        order.append((begin, min(begin + update_tokens, length), True, False))
        order.append((begin, min(begin + stride, length), False, True))
    return tuple(order)


def run_order(state, q, k, v, lr, order, *, rule=PLAIN, momentum=None, mask=None):
    """Entries (start, end, update, apply) one after the other, update before apply inside an entry
    (lact_nvs's op).

    Returns the state and the outputs of the applying entries joined in order, f32[B,H,sum,V]; the
    order is static.
    """
    tokens, outs = _Tokens((q, k, v), lr, momentum, mask), []
    for begin, end, learn, read in order:
        part = tokens.part(int(begin), int(end))
        q, k, v = part.tokens
        if learn:
            state = update(state, k, v, part.lr, rule, part.momentum, part.mask)
        if read:
            outs.append(apply(state.w, q))
    return state, jnp.concatenate(outs, axis=2)


def count_updates(lengths, chunk, mode):
    """i32 updates that sequences of so many tokens make. mode: shifted | block | full | off."""
    lengths = jnp.asarray(lengths, jnp.int32)
    if mode == "off":
        return jnp.zeros_like(lengths)
    if mode == "full":
        return (lengths > 0).astype(jnp.int32)
    chunks = -(-lengths // chunk)
    return jnp.maximum(chunks - 1, 0) if mode == "shifted" else chunks
