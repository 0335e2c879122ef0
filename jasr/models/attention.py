"""Attention with rotary positions and a window, as pure functions of arrays [B,T,N,H] (batch,
frames, heads, head dim)."""

import jax
import jax.numpy as jnp
import numpy as np

# Longest sequence whose scores are made in one piece; longer ones go through blocks of queries.
DENSE_FRAMES = 1024
QUERY_BLOCK = 512
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


def _reach(begin, end, frames, causal, window, chunk):
    """First and last+1 key that queries begin..end-1 may read."""
    window = window or frames
    low = max(0, begin - window + 1)
    if not causal:
        return low, min(frames, end + window - 1)
    return low, end if not chunk else min(frames, -(-end // chunk) * chunk)


def visible(begin, end, low, high, *, causal, window=0, chunk=0):
    """bool[queries, keys]: which keys low..high-1 the queries begin..end-1 may read. A static
    numpy mask.

    A window of W lets a query read W keys on each side it may look at, itself included; 0 is no
    limit. chunk > 0 lets a causal query read to the end of its own chunk (block-causal).
    """
    i = np.arange(begin, end)[:, None]
    j = np.arange(low, high)[None, :]
    seen = np.ones((end - begin, high - low), bool)
    if causal:
        seen &= j < (i // chunk + 1) * chunk if chunk else j <= i
    if window:
        seen &= np.abs(i - j) < window if not causal else i - j < window
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
    """f32 broadcastable to [B,N,T,S]: 0 where a key may be read, MASKED elsewhere."""
    mask = jnp.asarray(seen)[None, None]
    if key_mask is not None:
        key_mask = key_mask[:, None, None, :]
        mask = key_mask if seen.all() else mask & key_mask
    elif seen.all():
        return jnp.zeros((1, 1, 1, 1))
    return jnp.where(mask, 0.0, MASKED)


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
            key_value_seq_lengths=key_len,
            query_seq_lengths=None if key_len is None else jnp.full_like(key_len, frames),
            local_window_size=(window - 1, 0) if window else None,
        )
    dtype = v.dtype
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * (1 / np.sqrt(dim)), k, v))
    q = q.astype(dtype)
    key_mask = None if key_len is None else jnp.arange(frames) < key_len[:, None]
    limits = dict(causal=causal, window=window, chunk=chunk)
    if frames <= DENSE_FRAMES:
        bias = _bias(visible(0, frames, 0, frames, **limits), key_mask)
        out = softmax_attention(q, k, v, bias)
    else:
        block = jax.checkpoint(softmax_attention)
        outs = []
        for begin in range(0, frames, QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, frames)
            low, high = _reach(begin, end, frames, **limits)
            mask = None if key_mask is None else key_mask[:, low:high]
            bias = _bias(visible(begin, end, low, high, **limits), mask)
            outs.append(block(q[:, :, begin:end], k[:, :, low:high], v[:, :, low:high], bias))
        out = jnp.concatenate(outs, axis=2)
    return out.transpose(0, 2, 1, 3).astype(dtype)
