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
    x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


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
        high = min(frames, -(-high // chunk) * chunk if chunk else high) if causal else frames
        yield _Group(first, last, high, high)


def _whole_blocks(x, axis=1):
    """x [B,T,...] with zeros after it, to a whole number of query blocks; or a tree of such."""

    def padded(x):
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, -x.shape[axis] % QUERY_BLOCK)
        return jnp.pad(x, pads) if any(pads[axis]) else x

    return jax.tree.map(padded, x)


def _rows(x, begin, count):
    return jax.lax.dynamic_slice_in_dim(x, begin, count, axis=1)


def _turned(x, table, begin, back=False):
    """x [B,L,N,H] rotated as frames begin, begin + 1, ...; `back` turns it the other way."""
    if table is None:
        return x
    cos, sin = (jax.lax.dynamic_slice_in_dim(t, begin, x.shape[1]) for t in table)
    return rope(x, (cos, -sin if back else sin))


def _queries(qkv, table, number):
    """Queries of block `number`, [B,QUERY_BLOCK,N,H], rotated and scaled."""
    begin = number * QUERY_BLOCK
    q = _turned(_rows(qkv, begin, QUERY_BLOCK)[:, :, 0], table, begin)
    return (q * (1 / np.sqrt(q.shape[-1]))).astype(qkv.dtype)


def _near(group, limits, number, qkv, table, key_mask):
    """First key of query block `number`, its rotated keys, values and bias."""
    causal, window, chunk = limits
    begin = number * QUERY_BLOCK
    start = jnp.clip(begin - window + 1, 0, group.high - group.span) if window else 0
    near = _rows(qkv, start, group.span)
    if key_mask is not None:
        key_mask = _rows(key_mask, start, group.span)
    i, j = begin + jnp.arange(QUERY_BLOCK), start + jnp.arange(group.span)
    seen = visible(i, j, causal=causal, window=window, chunk=chunk)
    return start, _turned(near[:, :, 1], table, start), near[:, :, 2], _bias(seen, key_mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_attention(qkv, table, key_mask, limits):
    """`softmax_attention` over blocks of queries and the keys within their reach, f32[B,T,N,H].

    The backward pass recomputes a block's weights from the logarithm of their sum, so that memory
    is that of one block of scores. Blocks are cut out of the one array, rotated and transposed
    inside a scan, because outside of one XLA keeps every such copy until the backward pass (and
    would run unrolled blocks side by side).

    Args:
      qkv: [B,T,3,N,H]. table: `rope_table` that queries and keys are rotated by, or None; it gets
      no gradient. key_mask: bool[B,T], True = may be read, or None.
      limits: (causal, window, chunk) of `visible`.
    """
    return _blocked_forward(qkv, table, key_mask, limits)[0]


def _blocked_forward(qkv, table, key_mask, limits):
    frames, dtype = qkv.shape[1], qkv.dtype
    padded, turns = _whole_blocks(qkv), _whole_blocks(table, 0)
    outs, logs = [], []
    for group in _groups(frames, *limits):

        def block(_, number, group=group):
            q = _queries(padded, turns, number)
            _, k, v, bias = _near(group, limits, number, qkv, table, key_mask)
            scores = _product("btnh,bsnh->bnts", q, k, dtype) + bias
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = _product("bnts,bsnh->btnh", weights, v, dtype) / total.transpose(0, 2, 1, 3)
            return None, (out, top + jnp.log(total))

        _, (out, log) = jax.lax.scan(block, None, jnp.arange(group.first, group.last))
        outs.append(out)
        logs.append(log)
    out, log = (jnp.concatenate(x) for x in (outs, logs))  # log [blocks,B,N,QUERY_BLOCK,1]
    out = jnp.moveaxis(out, 0, 1).reshape(len(qkv), -1, *out.shape[3:])[:, :frames]
    return out, (qkv, table, key_mask, out, log)


def _blocked_backward(limits, kept, d_out):
    qkv, table, key_mask, out, log = kept
    frames, dtype = qkv.shape[1], qkv.dtype
    scale = 1 / np.sqrt(qkv.shape[-1])
    padded, turns = _whole_blocks(qkv), _whole_blocks(table, 0)
    outs, d_outs = _whole_blocks(out), _whole_blocks(d_out)
    d_qkv = jnp.zeros(padded.shape, jnp.float32)
    for group in _groups(frames, *limits):

        def block(d_qkv, number, group=group):
            begin = number * QUERY_BLOCK
            q, d_out = _queries(padded, turns, number), _rows(d_outs, begin, QUERY_BLOCK)
            start, k, v, bias = _near(group, limits, number, qkv, table, key_mask)
            weights = jnp.exp(_product("btnh,bsnh->bnts", q, k, dtype) + bias - log[number])
            d_weights = _product("btnh,bsnh->bnts", d_out, v, dtype)
            drain = jnp.sum(d_out * _rows(outs, begin, QUERY_BLOCK), axis=-1).transpose(0, 2, 1)
            d_scores = weights * (d_weights - drain[..., None])
            d_q = scale * _product("bnts,bsnh->btnh", d_scores, k, dtype)
            d_k = _product("bnts,btnh->bsnh", d_scores, q, dtype)
            d_v = _product("bnts,btnh->bsnh", weights, d_out, dtype)
            d_q, d_k = _turned(d_q, turns, begin, True), _turned(d_k, table, start, True)
            place = (0, start, 1, 0, 0)
            near = jnp.stack([d_k, d_v], axis=2)
            near += jax.lax.dynamic_slice(d_qkv, place, near.shape)
            d_qkv = jax.lax.dynamic_update_slice(d_qkv, near, place)
            return jax.lax.dynamic_update_slice(d_qkv, d_q[:, :, None], (0, begin, 0, 0, 0)), None

        d_qkv, _ = jax.lax.scan(block, d_qkv, jnp.arange(group.first, group.last))
    return d_qkv[:, :frames].astype(dtype), None, None


blocked_attention.defvjp(_blocked_forward, _blocked_backward)


def rotary_attention(qkv, table, *, causal, window=0, chunk=0, key_len=None):
    """`attend` of queries and keys that are still to be rotated.

    Args:
      qkv: [B,T,3,N,H]. table: `rope_table` of T frames.
      causal, window, chunk, key_len: see `attend`.
    """
    frames = qkv.shape[1]
    blocked = frames > DENSE_FRAMES and not _flash(qkv, causal, window, chunk)
    if blocked and 0 < window < frames:  # without a window keys would be rotated many times
        key_mask = None if key_len is None else jnp.arange(frames) < key_len[:, None]
        out = blocked_attention(qkv, table, key_mask, (causal, window, chunk))
        return out.astype(qkv.dtype)
    q, k, v = jnp.unstack(qkv, axis=2)
    limits = dict(causal=causal, window=window, chunk=chunk, key_len=key_len)
    return attend(rope(q, table), rope(k, table), v, **limits)


def _flash(x, causal, window, chunk):
    """Whether cuDNN's flash kernel takes it: 16 bit, and windows to the left only."""
    gpu = jax.default_backend() == "gpu" and x.dtype.itemsize == 2
    window = 0 if window >= x.shape[1] else window
    return gpu and x.shape[-1] % 8 == 0 and not chunk and (causal or not window)


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
    if _flash(q, causal, window, chunk):
        lengths = {}
        if key_len is not None:  # a row of padding alone: cuDNN gives NaN without any key at all
            lengths["key_value_seq_lengths"] = jnp.maximum(key_len, 1)
            lengths["query_seq_lengths"] = jnp.full_like(key_len, frames)
        if window:
            lengths["local_window_size"] = (window - 1, 0)
        flash = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        return flash(q, k, v, is_causal=causal, **lengths)
    dtype = v.dtype
    key_mask = None if key_len is None else jnp.arange(frames) < key_len[:, None]
    if frames > DENSE_FRAMES:
        qkv = jnp.stack([q.astype(dtype), k.astype(dtype), v], axis=2)
        return blocked_attention(qkv, None, key_mask, (causal, window, chunk)).astype(dtype)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * (1 / np.sqrt(dim)), k, v))
    every = np.arange(frames)
    seen = visible(every, every, causal=causal, window=window, chunk=chunk)
    out = softmax_attention(q.astype(dtype), k, v, _bias(jnp.asarray(seen), key_mask))
    return out.transpose(0, 2, 1, 3).astype(dtype)
