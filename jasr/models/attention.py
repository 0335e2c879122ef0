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


def _dense(q, k, v, seen, key_mask):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    if not seen.all():
        scores = jnp.where(jnp.asarray(seen), scores, MASKED)
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, None, :], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


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
    if jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and dim % 8 == 0 and not chunk:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            implementation="cudnn",
            key_value_seq_lengths=key_len,
            query_seq_lengths=None if key_len is None else jnp.full_like(key_len, frames),
            local_window_size=(window - 1, 0 if causal else window - 1) if window else None,
        )
    q = (q * (1 / np.sqrt(dim))).astype(q.dtype)
    key_mask = None if key_len is None else jnp.arange(frames) < key_len[:, None]
    limits = dict(causal=causal, window=window, chunk=chunk)
    if frames <= DENSE_FRAMES:
        return _dense(q, k, v, visible(0, frames, 0, frames, **limits), key_mask)
    outs = []
    for begin in range(0, frames, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, frames)
        low, high = _reach(begin, end, frames, **limits)
        block = jax.checkpoint(
            lambda q, k, v, m, b=begin, e=end, lo=low, hi=high: _dense(
                q, k, v, visible(b, e, lo, hi, **limits), m
            )
        )
        mask = None if key_mask is None else key_mask[:, low:high]
        outs.append(block(q[:, begin:end], k[:, low:high], v[:, low:high], mask))
    return jnp.concatenate(outs, axis=1)
