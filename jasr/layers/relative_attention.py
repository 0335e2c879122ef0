"""Attention with relative positions (Transformer-XL's, as NeMo has it), as pure functions.

The score of query i and key j is ((q_i + u) k_j + (q_i + w) p_(i-j)) / sqrt(H), with a vector p for
every distance. A context limits which keys a query may read. Short sequences take one piece;
longer ones, and all of NeMo's "rel_pos_local_attn", take blocks of queries with the keys within
their reach, so that time and memory grow with T * (left + right) (the Longformer's band). NeMo's
own band misplaces the position scores where left and right differ; here it is right.

Axes: N heads, B batch, T queries, S keys, R queries of a block, H head dim.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

# Longest sequence that full attention takes in one piece.
DENSE_FRAMES = 1024
QUERY_BLOCK = 128
# Finite, so that a row without any valid key gives finite numbers instead of NaN.
MASKED = -1e30


class Reach(typing.NamedTuple):
    """Which keys a query may read: `left` before and `right` after it (-1 = all).

    chunk > 0: those of its own chunk and of the left // chunk chunks before it; `right` is unused.
    """

    left: int = -1
    right: int = -1
    chunk: int = 0


class Plan(typing.NamedTuple):
    """How the queries are cut: `count` blocks of `rows`, each with a window of keys.

    The window begins `before` keys before the block and ends `after` keys after it; before = -1
    is every key, from the first to the last.
    """

    frames: int
    rows: int
    count: int
    before: int = -1
    after: int = 0

    @property
    def span(self):
        """Keys in the window of a block."""
        return self.frames if self.before < 0 else self.before + self.rows + self.after

    @property
    def positions(self):
        """First and last distance (query - key) whose p the blocks need, descending."""
        if self.before < 0:
            return self.count * self.rows - 1, 1 - self.frames
        return self.before + self.rows - 1, 1 - self.rows - self.after


def make_plan(frames, reach, local=False):
    """The `Plan` of T frames: one dense piece, or blocks for long sequences and if `local`.

    reach: a `Reach` of numbers, or None if it is only known when the program runs.
    """
    rows = QUERY_BLOCK
    if reach is not None and reach.chunk > 0:
        rows = -(-rows // reach.chunk) * reach.chunk
    if frames <= rows or (frames <= DENSE_FRAMES and not local):
        return Plan(frames, frames, 1)
    blocks = Plan(frames, rows, -(-frames // rows))
    if reach is None or reach.left < 0 or (reach.right < 0 and not reach.chunk):
        return blocks
    window = blocks._replace(before=reach.left, after=0 if reach.chunk else reach.right)
    return window if window.span < frames else blocks


def visible(i, j, reach):
    """bool[queries, keys]: which of the keys j the queries i may read; None if all.

    The numbers of `reach` may be arrays.
    """
    if isinstance(reach.left, int) and reach == Reach():
        return None
    i, j = i[:, None], j[None, :]
    if isinstance(reach.chunk, int) and reach.chunk == 0:
        return _limit(i - j, reach.left) & _limit(j - i, reach.right)
    chunk = jnp.maximum(reach.chunk, 1)
    apart = i // chunk - j // chunk
    left = jnp.where(reach.left < 0, -1, reach.left // chunk)
    regular = _limit(i - j, reach.left) & _limit(j - i, reach.right)
    return jnp.where(reach.chunk > 0, (apart >= 0) & _limit(apart, left), regular)


def _limit(distance, limit):
    return (distance <= limit) | (limit < 0)


def sinusoids(first, last, dim):
    """f32[first - last + 1, D] sinusoids of the positions first, first - 1, ..., last.

    sin in even channels, cos in odd ones, of position * 10000^(-2m/D) in f32, as models saw them.
    """
    rate = np.exp(np.arange(0, dim, 2, dtype=np.float32) * np.float32(-np.log(10000.0) / dim))
    angle = (first - jnp.arange(first - last + 1, dtype=jnp.float32))[:, None] * rate
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(angle.shape[0], dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def shear(x, columns):
    """[..., R, columns]: row r of x [..., R, columns + R - 1] from its element R - 1 - r on.

    Scores by distance become scores by key: a reshape to rows one element shorter moves each row
    by one more.
    """
    rows, width = x.shape[-2:]
    if rows == 1:
        return x
    x = x.reshape(*x.shape[:-2], rows * width)[..., rows - 1 : rows - 1 + rows * (width - 1)]
    return x.reshape(*x.shape[:-1], rows, width - 1)[..., :columns]


def _shear_backward(columns, _, cotangent):
    """The rows back at their places in zeros; concatenated, for XLA's pads are slow on CPUs."""
    *outer, rows, _ = cotangent.shape

    def zeros(*shape):
        return jnp.zeros((*outer, *shape), cotangent.dtype)

    if rows == 1:
        return (cotangent,)
    left = (rows - 1) // 2
    x = jnp.concatenate([zeros(rows, left), cotangent, zeros(rows, rows - 2 - left)], axis=-1)
    x = x.reshape(*outer, -1)
    x = jnp.concatenate([zeros(rows - 1 - left), x, zeros(1 + left)], axis=-1)
    return (x.reshape(*outer, rows, -1),)


shear.defvjp(lambda x, columns: (shear(x, columns), None), _shear_backward)


def _scores(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def relative_attention(q, k, v, key_len, *, plan, reach, relative=None, drop=None, extra=None):
    """Attention out [N,B,T,H] in v's dtype; rows of queries beyond key_len are 0.

    Scores and softmax are f32. A row of keys that are all padding gives 0 as well.

    Args:
      q, k, v: [N,B,T,H]; q not scaled.
      key_len: i32[B] valid frames.
      plan: `make_plan`'s. reach: `Reach`, of numbers or arrays.
      relative: (p [N,P,H] for the plan's positions, u [N,H], w [N,H]); None = no positions.
      drop: (weights f32[N,B,R,S], block number) -> weights, for dropout; None = none.
      extra: (scores f32[N,B,T,G], values [N,B,G,H]) of keys that all queries read besides.
    """
    frames, rows, count = plan[:3]
    dtype = v.dtype
    scale = 1 / np.sqrt(q.shape[-1])
    p, u, w = (None, 0, 0) if relative is None else relative
    u, w = (x if isinstance(x, int) else x[:, None, None] for x in (u, w))
    missing = count * rows - frames
    lead = max(plan.before, 0)
    pad = [(0, 0), (0, 0), (0, missing), (0, 0)]
    q_k = ((q + u) * scale).astype(dtype)
    q_p = None if p is None else jnp.pad(((q + w) * scale).astype(dtype), pad)
    q_k = jnp.pad(q_k, pad)
    if plan.before >= 0:
        pad[2] = (lead, missing + plan.after)
        k, v = jnp.pad(k, pad), jnp.pad(v, pad)
    if extra is not None:
        extra = jnp.pad(extra[0], [(0, 0), (0, 0), (0, missing), (0, 0)]), extra[1]

    def block(number):
        begin = number * rows
        start = begin if plan.before >= 0 else 0

        def cut(x, start, size):
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)

        near, values = cut(k, start, plan.span), cut(v, start, plan.span)
        scores = _scores("nbrh,nbsh->nbrs", cut(q_k, begin, rows), near)
        if p is not None:
            here = p
            if plan.before < 0:
                here = jax.lax.dynamic_slice_in_dim(
                    p, (count - 1 - number) * rows, frames + rows - 1, axis=1
                )
            queries = cut(q_p, begin, rows)  # with one axis of rows their gradient needs no copies
            by_distance = _scores("nrh,nmh->nrm", queries.reshape(len(q), -1, q.shape[-1]), here)
            scores += shear(by_distance.reshape(*scores.shape[:-1], -1), plan.span)
        i, j = begin + jnp.arange(rows), start - lead + jnp.arange(plan.span)
        seen = (j >= 0) & (j < key_len[:, None])
        seen = seen[:, None, :]
        context = visible(i, j, reach)
        if context is not None:
            seen = seen & context
        scores = jnp.where(seen, scores, MASKED)
        if extra is not None:
            scores = jnp.concatenate([cut(extra[0], begin, rows), scores], axis=-1)
            values = jnp.concatenate([extra[1], values], axis=2)
        weights = jax.nn.softmax(scores)
        if drop is not None:
            weights = drop(weights, number)
        out = _scores("nbrs,nbsh->nbrh", weights.astype(dtype), values)
        valid = i < key_len[:, None]
        return jnp.where(valid[:, :, None], out, 0).astype(dtype)

    if count == 1:
        return block(0)
    out = jax.lax.map(jax.checkpoint(block), jnp.arange(count))
    out = jnp.moveaxis(out, 0, 2)  # [N,B,count,R,H]
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :frames]


def attention_with_global(q, k, v, own, key_len, chosen, **options):
    """`relative_attention` in which the frames `chosen` read all frames and are read by all.

    They count twice for queries near to them, once by position and once without, as in NeMo, whose
    own code mixes up the queries of several global frames. One that is padding is not read (NeMo
    reads it).

    Args:
      q, k, v: [N,B,T,H]. own: the queries, keys and values of global attention, likewise.
      chosen: numbers of the global frames, ascending.
      options: of `relative_attention`; drop gets the block number -1 for the chosen frames.
    """
    chosen = np.asarray(chosen)
    chosen = chosen[chosen < q.shape[2]]
    own_q, own_k, own_v = own
    own_q = own_q * (1 / np.sqrt(q.shape[-1]))
    there = (chosen < key_len[:, None])[:, None]
    scores = _scores("nbth,nbgh->nbtg", own_q, own_k[:, :, chosen])
    extra = jnp.where(there, scores, MASKED), v[:, :, chosen]
    out = relative_attention(q, k, v, key_len, extra=extra, **options)
    # what the chosen frames read
    scores = _scores("nbgh,nbsh->nbgs", own_q[:, :, chosen], own_k)
    seen = jnp.arange(k.shape[2]) < key_len[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, :], scores, MASKED))
    if (drop := options.get("drop")) is not None:
        weights = drop(weights, -1)
    theirs = _scores("nbgs,nbsh->nbgh", weights.astype(own_v.dtype), own_v)
    theirs = jnp.where(jnp.swapaxes(there, 1, 2), theirs, 0).astype(own_v.dtype)
    return out.at[:, :, chosen].set(theirs)
