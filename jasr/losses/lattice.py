"""The lattices of RNN-T (Graves, 2012) and TDT (Xu et al., 2023), one diagonal after the other.

Node (t, u) stands before frame t with u labels behind it; paths run from (0, 0) to (T, U). An arc
leaves a node with the blank, to (t + d, u), or with label u, to (t + d, u + 1). RNN-T's blank takes
d = 1 frame and its labels none; in TDT both take one of the given durations, but the blank never 0.
Only a blank may end on T, and it must end there exactly.

Nodes of the same diagonal t + u do not depend on each other, so T + U steps over arrays [B, U + 1]
do without a recursion over u inside. The forward pass scores what follows each node, in log space.
The backward pass needs no second one: how likely a path leaves a node by each of its arcs is the
softmax of the arcs' scores, so the probability 1 that stands at (0, 0) is handed on from node to
node in linear space, where nothing can overflow and nothing is lost to the size of the scores.
"""

import functools

import jax
import jax.numpy as jnp

NEVER = -1e30  # log of an impossible step: finite, so that differences of two are not NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def log_likelihood(cells, enc_len, token_len, durations=None):
    """Log of the summed probability of all paths of each row, f32[B]; NEVER or less without any.

    Args:
      cells: f32[B, T, U + 1, 2 + E], the log-probabilities at each node of the blank, of label u,
        and of each duration. What lies outside of a row's lengths is not looked at.
      enc_len, token_len: i32[B], T and U of each row.
      durations: a tuple of the E durations (TDT), or None (RNN-T, E = 0).
    """
    return _log_likelihood_fwd(cells, enc_len, token_len, durations)[0]


def within(frames, nodes, enc_len, token_len):
    """bool[B, frames, nodes]: the nodes (frame, u) within the lengths of each row."""
    is_frame = jnp.arange(frames)[:, None] < enc_len[:, None, None]
    return is_frame & (jnp.arange(nodes) <= token_len[:, None, None])


def log_sum_exp(x, axis):
    """log of the sum of exp(x), as (the largest x, what the others add to it).

    The others are summed without the 1 of the largest, so that little is not rounded away.
    """
    top = jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf)
    is_top = x == top
    others = jnp.sum(jnp.where(is_top, 0.0, jnp.exp(x - top)), axis=axis)
    equals = jnp.sum(is_top, axis=axis) - 1
    return jnp.squeeze(top, axis), jnp.log1p(others + equals)


def arcs_of(durations):
    """(frames, label or blank, channel of the duration or None) of each arc, blanks first."""
    if durations is None:
        return [(1, 0, None), (0, 1, None)]
    timed = [(frames, label, 2 + i) for label in (0, 1) for i, frames in enumerate(durations)]
    return [arc for arc in timed if arc[0] or arc[1]]


def _reach(durations):
    """How many diagonals ahead the longest arc ends."""
    return 1 if durations is None else 1 + max(durations)


def _log_likelihood_fwd(cells, enc_len, token_len, durations):
    by_diagonal = _skew(_masked(cells, enc_len, token_len))
    size = by_diagonal.shape[2:]

    def step(later, x):
        n, cell = x
        scores = _arc_scores(n, cell, later, enc_len, token_len, durations)
        score = jnp.maximum(sum(log_sum_exp(scores, axis=0)), NEVER)
        return (score, *later[:-1]), score

    later = (jnp.full(size, NEVER),) * _reach(durations)
    numbered = (jnp.arange(len(by_diagonal)), by_diagonal)
    (first, *_), scores = jax.lax.scan(step, later, numbered, reverse=True)
    return first[:, 0], (cells, scores, enc_len, token_len)


def _log_likelihood_bwd(durations, saved, g):
    cells, scores, enc_len, token_len = saved
    by_diagonal = _skew(_masked(cells, enc_len, token_len))
    reach = _reach(durations)
    scores = jnp.pad(scores, ((0, reach), (0, 0), (0, 0)), constant_values=NEVER)

    def step(coming, x):
        n, cell = x
        here, *coming = *coming, jnp.zeros_like(coming[0])  # coming[k]: on diagonal n + 1 + k
        later = [jax.lax.dynamic_index_in_dim(scores, n + 1 + k, 0, False) for k in range(reach)]
        arcs = _arc_scores(n, cell, later, enc_len, token_len, durations)
        top = jnp.max(arcs, axis=0)
        weights = jnp.exp(arcs - top)
        here = jnp.where(top > NEVER / 2, here, 0.0)
        arcs = here / jnp.sum(weights, axis=0) * weights
        grad = [jnp.zeros_like(here)] * len(cell)
        for (frames, label, channel), arc in zip(arcs_of(durations), arcs, strict=True):
            after = jnp.pad(arc[:, :-1], ((0, 0), (1, 0))) if label else arc
            coming[frames - 1 + label] += after
            for k in (label, channel):
                if k is not None:
                    grad[k] += arc
        return tuple(coming), jnp.stack(grad)

    start = jnp.zeros(scores.shape[1:]).at[:, 0].set(g)
    coming = (start, *(jnp.zeros_like(start),) * reach)
    numbered = (jnp.arange(len(by_diagonal)), by_diagonal)
    _, grad = jax.lax.scan(step, coming, numbered)
    return _unskew(grad, cells.shape[1]), None, None


log_likelihood.defvjp(_log_likelihood_fwd, _log_likelihood_bwd)


def _masked(cells, enc_len, token_len):
    """The cells with NEVER for blanks and labels that the row does not have."""
    _, T, U1, channels = cells.shape
    blank, label = (within(T, U1, enc_len, n) for n in (token_len, token_len - 1))
    duration = jnp.ones_like(blank)
    exists = jnp.stack([blank, label, *[duration] * (channels - 2)], axis=-1)
    return jnp.where(exists, jnp.maximum(cells, NEVER), NEVER)


def _arc_scores(n, cell, later, enc_len, token_len, durations):
    """Scores f32[arcs, B, U + 1] of the arcs that leave diagonal n and of all that follows them.

    Args:
      cell: f32[2 + E, B, U + 1]; later: the scores of the following diagonals, f32[B, U + 1] each.
    """
    u = jnp.arange(cell.shape[2])
    frames_left = enc_len[:, None] - (n - u)
    at_end = u == token_len[:, None]
    scores = []
    for frames, label, channel in arcs_of(durations):
        after = later[frames - 1 + label]
        if label:
            after = jnp.pad(after[:, 1:], ((0, 0), (0, 1)), constant_values=NEVER)
        else:
            after = jnp.where(at_end & (frames_left == frames), 0.0, after)
        score = cell[label] + after
        scores.append(score if channel is None else score + cell[channel])
    return jnp.stack(scores)


def _skew(cells):
    """[B, T, U + 1, C] -> [T + U, C, B, U + 1]: row n holds t = n - u of column u, or NEVER.

    Each column is padded by U + 1 and read with a stride of one less, which moves column u by u.
    """
    B, T, U1, C = cells.shape
    x = jnp.pad(cells.transpose(3, 0, 2, 1), ((0, 0),) * 3 + ((0, U1),), constant_values=NEVER)
    x = x.reshape(C, B, U1 * (T + U1))[:, :, : U1 * (T + U1 - 1)]
    return x.reshape(C, B, U1, T + U1 - 1).transpose(3, 0, 1, 2)


def _unskew(rows, frames):
    """The inverse of `_skew`: [T + U, C, B, U + 1] -> [B, T, U + 1, C]."""
    N, C, B, U1 = rows.shape
    x = rows.transpose(1, 2, 3, 0).reshape(C, B, U1 * N)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, U1))).reshape(C, B, U1, N + 1)
    return x[..., :frames].transpose(1, 3, 2, 0)
