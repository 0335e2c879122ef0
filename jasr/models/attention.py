"""Attention with rotary positions and a window, as pure functions of arrays [B,T,N,H] (batch,
frames, heads, head dim)."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Longest sequence whose scores are made in one piece; longer ones go through blocks of queries.
DENSE_FRAMES = 1024
QUERY_BLOCK = 256
# Finite, so that a row without any valid key gives finite numbers instead of NaN.
MASKED = -1e30


def rope_table(frames, dim, theta, offset=0):
    """cos and sin, f32[T, dim/2], of the rotary angles (offset + t) * theta^(-2i/dim)."""
    inverse = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if isinstance(offset, int):
        angle = np.outer(np.arange(offset, offset + frames), inverse)
        return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
    angle = (offset + jnp.arange(frames))[:, None] * jnp.asarray(inverse, jnp.float32)
    return jnp.cos(angle), jnp.sin(angle)


def rope(x, table):
    """x [B,T,N,H] rotated by its position, in x's dtype; pairs are (i, i + H/2) ("half split", as
    GPT-NeoX and LLaMA)."""
    cos, sin = (t[None, :, None, :] for t in table)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def visible(i, j, *, causal, window=0, chunk=0):
    """bool[queries, keys]: which of the keys j i32[keys] the queries i i32[queries] may read.

    A window of W lets a query read W keys on each side it may look at, itself included; 0 is no
    limit. chunk > 0 lets a causal query read to the end of its own chunk (block-causal). NumPy
    indices give a NumPy mask.
    """
    i, j = i[:, None], j[None, :]
    seen = (j >= 0) & (i >= 0)
    if causal:
        seen &= j < (i // chunk + 1) * chunk if chunk else j <= i
    if window:
        seen &= i - j < window
        if not causal:
            seen &= j - i < window
    return seen


@jax.custom_vjp
def softmax_attention(q, k, v, bias):
    """softmax(q k' + bias) v, f32[B,N,T,H], for q (scaled already), k, v [B,N,T|S,H] in one piece.

    The hand-written backward pass keeps the unnormalised weights and takes the softmax's row sums
    from the output, [T,H], instead of from the scores, [T,S]: 1.6 times faster on CPUs than what
    JAX derives. No gradient for `bias` (f32, broadcast against [B,N,T,S]).
    """
    return _softmax_attention_forward(q, k, v, bias)[0]


def _product(equation, x, y, dtype):
    return jnp.einsum(
        equation, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
    )


def _softmax_attention_forward(q, k, v, bias):
    scores = _product("bnth,bnsh->bnts", q, k, q.dtype) + bias
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _product("bnts,bnsh->bnth", weights, v, v.dtype) / total
    return out, (q, k, v, weights, total, out)


def _softmax_attention_backward(kept, d_out):
    q, k, v, weights, total, out = kept
    d_out = d_out / total
    d_v = _product("bnts,bnth->bnsh", weights, d_out, v.dtype)
    d_weights = _product("bnth,bnsh->bnts", d_out, v, v.dtype)
    d_scores = weights * (d_weights - jnp.sum(d_out * out, axis=-1, keepdims=True))
    d_q = _product("bnts,bnsh->bnth", d_scores, k, k.dtype)
    d_k = _product("bnts,bnth->bnsh", d_scores, q, q.dtype)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


softmax_attention.defvjp(_softmax_attention_forward, _softmax_attention_backward)


def _bias(seen, key_mask):
    """f32 that broadcasts to [B,N,T,S]: 0 where a key may be read, MASKED elsewhere."""
    mask = seen[None, None]
    if key_mask is not None:
        mask = mask & key_mask[:, None, None, :]
    return jnp.where(mask, 0.0, MASKED)


class _Group(NamedTuple):
    """Query blocks first..last-1, which read among the keys 0..high-1, `span` of them a block."""

    first: int
    last: int
    high: int
    span: int


def _groups(frames, causal, window, chunk):
    """Query blocks in groups of one shape: one for a window, four of growing reach without."""
    blocks = -(-frames // QUERY_BLOCK)
    if window:
        ahead = (max(chunk - 1, 0)) if causal else window - 1
        yield _Group(0, blocks, frames, min(frames, QUERY_BLOCK + window - 1 + ahead))
        return
    edges = sorted({-(-blocks * n // 4) for n in range(5)}) if causal else [0, blocks]
    for first, last in itertools.pairwise(edges):
        high = last * QUERY_BLOCK
        high = min(frames, -(-high // chunk) * chunk if chunk else high)
        yield _Group(first, last, high if causal else frames, high if causal else frames)


def _split(x, group):
    """Rows of the group's blocks, [blocks,B,N,QUERY_BLOCK,H], zeros beyond the end."""
    rows = x[:, :, group.first * QUERY_BLOCK : group.last * QUERY_BLOCK]
    count = group.last - group.first
    missing = count * QUERY_BLOCK - rows.shape[2]
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, missing), (0, 0)))
    return jnp.moveaxis(rows.reshape(*x.shape[:2], count, QUERY_BLOCK, x.shape[3]), 2, 0)


def _join(blocks, frames):
    """The inverse of `_split` for the blocks of all groups, [B,N,T,H]."""
    x = jnp.moveaxis(jnp.concatenate(blocks, axis=0), 0, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[4])[:, :, :frames]


def _block(group, limits, number, k, v, key_mask):
    """First key of query block `number`, its keys, values and bias."""
    causal, window, chunk = limits
    begin = number * QUERY_BLOCK
    start = jnp.clip(begin - window + 1, 0, group.high - group.span) if window else 0
    k, v = (jax.lax.dynamic_slice_in_dim(x, start, group.span, axis=2) for x in (k, v))
    if key_mask is not None:
        key_mask = jax.lax.dynamic_slice_in_dim(key_mask, start, group.span, axis=1)
    i, j = begin + jnp.arange(QUERY_BLOCK), start + jnp.arange(group.span)
    seen = visible(i, j, causal=causal, window=window, chunk=chunk)
    return start, k, v, _bias(seen, key_mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked_attention(q, k, v, key_mask, limits):
    """`softmax_attention` over blocks of queries and the keys within their reach, f32[B,N,T,H].

    The backward pass recomputes a block's weights from the logarithm of their sum, so that memory
    is that of one block of scores. (A scan, because XLA would run unrolled blocks side by side.)

    Args:
      q, k, v: [B,N,T,H], q scaled already. key_mask: bool[B,T], True = may be read, or None.
      limits: (causal, window, chunk) of `visible`.
    """
    return _blocked_forward(q, k, v, key_mask, limits)[0]


def _blocked_forward(q, k, v, key_mask, limits):
    frames = q.shape[2]
    outs, logs = [], []
    for group in _groups(frames, *limits):

        def block(_, x, group=group):
            number, q = x
            _, k_near, v_near, bias = _block(group, limits, number, k, v, key_mask)
            scores = _product("bnth,bnsh->bnts", q, k_near, q.dtype) + bias
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = _product("bnts,bnsh->bnth", weights, v_near, v.dtype) / total
            return None, (out, top + jnp.log(total))

        numbers = jnp.arange(group.first, group.last)
        _, (out, log) = jax.lax.scan(block, None, (numbers, _split(q, group)))
        outs.append(out)
        logs.append(log)
    out, log = _join(outs, frames), _join(logs, frames)
    return out, (q, k, v, key_mask, out, log)


def _blocked_backward(limits, kept, d_out):
    q, k, v, key_mask, out, log = kept
    frames = q.shape[2]
    drain = jnp.sum(d_out * out, axis=-1, keepdims=True)
    d_qs, d_kv = [], (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    for group in _groups(frames, *limits):

        def block(d_kv, x, group=group):
            number, q, d_out, drain, log = x
            start, k_near, v_near, bias = _block(group, limits, number, k, v, key_mask)
            weights = jnp.exp(_product("bnth,bnsh->bnts", q, k_near, q.dtype) + bias - log)
            d_weights = _product("bnth,bnsh->bnts", d_out, v_near, v.dtype)
            d_scores = weights * (d_weights - drain)
            near = (
                _product("bnts,bnth->bnsh", d_scores, q, q.dtype),
                _product("bnts,bnth->bnsh", weights, d_out, v.dtype),
            )
            sums = (
                d + jax.lax.dynamic_slice_in_dim(all_, start, group.span, axis=2)
                for d, all_ in zip(near, d_kv, strict=True)
            )
            d_kv = tuple(
                jax.lax.dynamic_update_slice_in_dim(all_, d, start, axis=2)
                for d, all_ in zip(sums, d_kv, strict=True)
            )
            return d_kv, _product("bnts,bnsh->bnth", d_scores, k_near, k.dtype)

        numbers = jnp.arange(group.first, group.last)
        rows = tuple(_split(x, group) for x in (q, d_out, drain, log))
        d_kv, d_q = jax.lax.scan(block, d_kv, (numbers, *rows))
        d_qs.append(d_q)
    d_k, d_v = d_kv
    return _join(d_qs, frames).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


blocked_attention.defvjp(_blocked_forward, _blocked_backward)


def attend(q, k, v, *, causal, window=0, chunk=0, key_len=None):
    """Softmax attention out [B,T,N,H] with scale 1/sqrt(H); scores and softmax in f32.

    On GPUs in 16-bit types cuDNN's flash kernel does it; elsewhere short sequences take one piece
    and longer ones blocks of queries that are recomputed in the backward pass and skip the keys
    that no query of the block may read.

    Args:
      q, k, v: [B,T,N,H], rotated already.
      causal, window, chunk: see `visible`.
      key_len: i32[B]; keys from there on are not read. Needed where a query may look ahead into
      padding.
    """
    frames, dim = q.shape[1], q.shape[3]
    window = 0 if window >= frames else window
    flash = jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and dim % 8 == 0 and not chunk
    if flash and (causal or not window):  # cuDNN has windows to the left only
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            implementation="cudnn",
            # a row of padding alone: cuDNN gives NaN where there is no key at all
            key_value_seq_lengths=None if key_len is None else jnp.maximum(key_len, 1),
            query_seq_lengths=None if key_len is None else jnp.full_like(key_len, frames),
            local_window_size=(window - 1, 0) if window else None,
        )
    dtype = v.dtype
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * (1 / np.sqrt(dim)), k, v))
    q = q.astype(dtype)
    key_mask = None if key_len is None else jnp.arange(frames) < key_len[:, None]
    limits = dict(causal=causal, window=window, chunk=chunk)
    if frames <= DENSE_FRAMES:
        every = np.arange(frames)
        bias = _bias(jnp.asarray(visible(every, every, **limits)), key_mask)
        out = softmax_attention(q, k, v, bias)
    else:
        out = blocked_attention(q, k, v, key_mask, (causal, window, chunk))
    return out.transpose(0, 2, 1, 3).astype(dtype)
