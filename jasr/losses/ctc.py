"""Connectionist temporal classification (Graves et al., 2006), gather-first and in log space.

Only the logits of each row's own tokens enter the scan, measured from the blank's logit of the
same frame. A path's score is then the sum of its tokens' differences plus one sum over frames that
all paths share, so blank steps add nothing, numbers stay small and no [B, T, V] array is made
before the gradient. One scan runs both directions: the backward one is the forward recursion on
time-reversed, token-reversed inputs, stacked along the batch axis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

NEVER = -1e30  # log of an impossible step: finite, so that differences of two are not NaN


def ctc_loss(logits, logit_len, tokens, token_len, blank=0):
    """Negative log-likelihood of each row's tokens, and whether the row can be aligned at all.

    A row is feasible if it has a frame for every token and one more between equal neighbours;
    an infeasible row has loss 0 and gradient 0. A row without tokens must be all blank; a padding
    row (no frames, no tokens) is feasible with loss 0. Computed in float32 whatever comes in. The
    gradient is softmax minus the posterior of each symbol (Graves et al., 2006, eq. 16), written
    by hand from the forward and backward scores; it is exact, but not differentiable again.

    Args:
      logits: f[B, T, V], not normalised.
      logit_len: i32[B] valid frames.
      tokens: i32[B, L]; what stands after `token_len` is not looked at.
      token_len: i32[B] valid tokens.
      blank: id of the blank, anywhere in 0..V-1.

    Returns:
      loss f32[B] in nats and feasible bool[B].
    """
    logit_len, token_len = logit_len.astype(jnp.int32), token_len.astype(jnp.int32)
    is_token = jnp.arange(tokens.shape[1]) < token_len[:, None]
    tokens = jnp.where(is_token, tokens, blank).astype(jnp.int32)
    repeats = jnp.sum(_repeats(tokens) & is_token, axis=1)
    feasible = logit_len >= token_len + repeats
    loss = _loss(logits, logit_len, tokens, token_len, feasible, blank)
    return loss, feasible


def _repeats(tokens):
    """bool[B, L]: the token equals the one before it, so that a blank must stand between them."""
    return jnp.pad(tokens[:, 1:] == tokens[:, :-1], ((0, 0), (1, 0)))[:, : tokens.shape[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _loss(logits, logit_len, tokens, token_len, feasible, blank):
    steps, base, _ = _differences(logits, logit_len, tokens, token_len, blank)
    total, _ = _scan(steps, _repeats(tokens), jnp.zeros_like(token_len), token_len, stack=False)
    return jnp.where(feasible, -(total + base), 0.0)


def _differences(logits, logit_len, tokens, token_len, blank):
    """Token logits less the blank's f32[T, B, L]; log-probability of all blanks f32[B]; lse."""
    logits = logits.astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)  # [B, T]
    is_frame = jnp.arange(logits.shape[1]) < logit_len[:, None]
    is_token = jnp.arange(tokens.shape[1]) < token_len[:, None]
    zero = logits[:, :, blank]
    base = jnp.sum(jnp.where(is_frame, zero - lse, 0.0), axis=1)
    own = jnp.take_along_axis(logits, tokens[:, None, :], axis=2, mode="clip")
    valid = is_frame[:, :, None] & is_token[:, None, :]
    steps = jnp.where(valid, jnp.maximum(own - zero[:, :, None], NEVER), NEVER)
    return steps.transpose(1, 0, 2), base, lse


def _scan(steps, repeats, first, last, stack):
    """Score of all paths from state `first` to state `last`, f32[R], and each token's scores.

    State n means n tokens done. blank[n] and token[n] are the scores of the paths that stand in
    state n on a blank or on its token. Frames outside the row carry NEVER for all tokens and so
    leave the blanks as they are; they may stand on either side.

    Args:
      steps: f32[T, R, L] score of token n + 1 at frame t, a blank's being 0.
      repeats: bool[R, L]; first, last: i32[R].
    """
    R, L = repeats.shape
    states = jnp.arange(L + 1)
    blank = jnp.where(states == first[:, None], 0.0, NEVER)
    token = jnp.full((R, L), NEVER)

    def step(carry, difference):
        blank, token = carry
        done = jnp.concatenate([blank[:, :1], jnp.logaddexp(blank[:, 1:], token)], axis=1)
        before = jnp.where(repeats, blank[:, :-1], done[:, :-1])
        token = jnp.maximum(jnp.logaddexp(token, before) + difference, NEVER)
        return (done, token), token if stack else None

    (blank, token), tokens = jax.lax.scan(step, (blank, token), steps)
    done = jnp.concatenate([blank[:, :1], jnp.logaddexp(blank[:, 1:], token)], axis=1)
    return jnp.take_along_axis(done, last[:, None], axis=1)[:, 0], tokens


def _loss_fwd(logits, logit_len, tokens, token_len, feasible, blank):
    steps, base, lse = _differences(logits, logit_len, tokens, token_len, blank)
    B, L = tokens.shape
    repeats = _repeats(tokens)
    # Seen from the end, token n repeats token n + 1.
    mirrored = jnp.pad(repeats, ((0, 0), (0, 1)))[:, 1:][:, ::-1]
    zeros, ends = jnp.zeros_like(token_len), jnp.full_like(token_len, L)
    total, scores = _scan(
        jnp.concatenate([steps, steps[::-1, :, ::-1]], axis=1),
        jnp.concatenate([repeats, mirrored]),
        jnp.concatenate([zeros, L - token_len]),
        jnp.concatenate([token_len, ends]),
        stack=True,
    )
    total = total[:B]
    joint = scores[:, :B] + scores[::-1, B:, ::-1] - steps
    posterior = jnp.exp(jnp.where(steps > NEVER, joint - total[:, None], NEVER))
    loss = jnp.where(feasible, -(total + base), 0.0)
    return loss, (logits, lse, posterior, logit_len, tokens, feasible)


def _loss_bwd(blank, saved, g):
    logits, lse, posterior, logit_len, tokens, feasible = saved
    B, T, V = logits.shape
    is_frame = jnp.arange(T) < logit_len[:, None]
    scale = jnp.where(feasible, g, 0.0)[:, None, None] * is_frame[:, :, None]
    posterior = posterior.transpose(1, 0, 2)  # [B, T, L]
    rest = 1.0 - jnp.sum(posterior, axis=2)  # of the blank
    rows = jnp.arange(B)[:, None, None]
    frames = jnp.arange(T)[:, None]
    occupied = jnp.zeros((B, T, V)).at[rows, frames, tokens[:, None, :]].add(posterior)
    occupied = occupied.at[:, :, blank].add(rest)
    softmax = jnp.exp(logits.astype(jnp.float32) - lse[:, :, None])
    grad = jnp.where(scale != 0, scale * (softmax - occupied), 0.0).astype(logits.dtype)
    others = (logit_len, tokens, logit_len, feasible)
    nothing = [np.zeros(x.shape, jax.dtypes.float0) for x in others]
    return (grad, *nothing)


_loss.defvjp(_loss_fwd, _loss_bwd)
