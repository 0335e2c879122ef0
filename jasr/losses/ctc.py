"""Connectionist temporal classification (Graves et al., 2006), gather-first and in log space.

Only the logits of the blank and of each row's own tokens enter the scan, measured from the largest
of them in each frame. That reference is the same for all paths, so its sum over frames is added
once at the end; scores stay small (near 0 for a model that is sure, where float32 would lose most)
and no [B, T, V] array is made before the gradient. One scan runs both directions: the backward one
is the forward recursion on time-reversed, token-reversed inputs.
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
    feasible = has_path(logit_len, tokens, token_len)
    loss = _loss(logits, logit_len, tokens, token_len, feasible, blank)
    return loss, feasible


def has_path(logit_len, tokens, token_len):
    """bool[B]: the frames are enough for the tokens and a blank between equal neighbours.

    Args:
      logit_len: i32[B] valid frames; tokens: i32[B, L]; token_len: i32[B] valid tokens.
    """
    is_token = jnp.arange(tokens.shape[1]) < token_len[:, None]
    return logit_len >= token_len + jnp.sum(_repeats(tokens) & is_token, axis=1)


def frames_needed(tokens):
    """The fewest frames that a path of these token ids (a sequence) takes: tokens + repeats."""
    return len(tokens) + sum(a == b for a, b in zip(tokens, tokens[1:], strict=False))


def _repeats(tokens):
    """bool[B, L]: the token equals the one before it, so that a blank must stand between them."""
    return jnp.pad(tokens[:, 1:] == tokens[:, :-1], ((0, 0), (1, 0)))[:, : tokens.shape[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _loss(logits, logit_len, tokens, token_len, feasible, blank):
    stay, steps, base, _ = _differences(logits, logit_len, tokens, token_len, blank)
    total, _ = _scan(stay, steps, _repeats(tokens), jnp.zeros_like(token_len), token_len)
    return jnp.where(feasible, -(total + base), 0.0)


def _differences(logits, logit_len, tokens, token_len, blank):
    """Each frame's logits less their reference, and what the reference adds to every path.

    Returns:
      stay f32[T, B, 1] of the blank, steps f32[T, B, L] of the tokens (0 and NEVER outside the
      row), the log-probability of the references f32[B], and lse f32[B, T].
    """
    logits = logits.astype(jnp.float32)
    # The barrier keeps XLA from computing the sum over V once for each of its two readers.
    lse = jax.lax.optimization_barrier(jax.nn.logsumexp(logits, axis=-1))
    is_frame = (jnp.arange(logits.shape[1]) < logit_len[:, None]).T[:, :, None]  # [T, B, 1]
    is_token = jnp.arange(tokens.shape[1]) < token_len[:, None]
    by_time = logits.transpose(1, 0, 2)
    zero = by_time[:, :, blank, None]
    own = jnp.take_along_axis(by_time, tokens[None], axis=2, mode="clip")
    own = jnp.where(is_token, own, NEVER)
    reference = jnp.maximum(zero, jnp.max(own, axis=2, keepdims=True, initial=NEVER))
    stay = jnp.where(is_frame, jnp.maximum(zero - reference, NEVER), 0.0)
    steps = jnp.where(is_frame & is_token, jnp.maximum(own - reference, NEVER), NEVER)
    base = jnp.sum(jnp.where(is_frame, reference - lse.T[:, :, None], 0.0), axis=(0, 2))
    return stay, steps, base, lse


def _either(a, b):
    """log(exp a + exp b) of finite numbers: jnp.logaddexp's care for infinities costs 40 %."""
    return jnp.maximum(a, b) + jnp.log(1.0 + jnp.exp(-jnp.abs(a - b)))


def _scan(stay, steps, repeats, first, last):
    """Score of all paths from state `first` to state `last`, f32[...], and each token's scores.

    State n means n tokens done. blank[n] and token[n - 1] are the scores of the paths that stand
    in state n on a blank or on its token. Frames outside the row carry 0 for the blank and NEVER
    for every token and so leave the blanks as they are; they may stand on either side of the row.

    Args:
      stay: f32[T, ..., 1] and steps: f32[T, ..., L], scores of the blank and of token n + 1.
      repeats: bool[..., L]; first, last: i32[...].
    """
    blank = jnp.where(jnp.arange(steps.shape[-1] + 1) == first[..., None], 0.0, NEVER)
    token = jnp.full_like(blank[..., 1:], NEVER)

    def leave(blank, token):
        return jnp.concatenate([blank[..., :1], _either(blank[..., 1:], token)], axis=-1)

    def step(carry, score):
        (blank, token), (stay, step) = carry, score
        done = leave(blank, token)
        before = jnp.where(repeats, blank[..., :-1], done[..., :-1])
        token = jnp.maximum(_either(token, before) + step, NEVER)
        return (jnp.maximum(done + stay, NEVER), token), token

    (blank, token), tokens = jax.lax.scan(step, (blank, token), (stay, steps))
    done = leave(blank, token)
    return jnp.take_along_axis(done, last[..., None], axis=-1)[..., 0], tokens


def _loss_fwd(logits, logit_len, tokens, token_len, feasible, blank):
    stay, steps, base, lse = _differences(logits, logit_len, tokens, token_len, blank)
    repeats = _repeats(tokens)
    # Seen from the end, token n repeats token n + 1.
    mirrored = jnp.pad(repeats, ((0, 0), (0, 1)))[:, 1:][:, ::-1]
    length = jnp.full_like(token_len, tokens.shape[1])
    # A new axis, not a longer batch, so that a batch sharded over devices stays where it is.
    total, scores = _scan(
        jnp.stack([stay, stay[::-1]], axis=1),
        jnp.stack([steps, steps[::-1, :, ::-1]], axis=1),
        jnp.stack([repeats, mirrored]),
        jnp.stack([jnp.zeros_like(token_len), length - token_len]),
        jnp.stack([token_len, length]),
    )
    joint = scores[:, 0] + scores[::-1, 1, :, ::-1] - steps
    posterior = jnp.exp(jnp.where(steps > NEVER, joint - total[0, :, None], NEVER))
    loss = jnp.where(feasible, -(total[0] + base), 0.0)
    return loss, (logits, lse, posterior, logit_len, tokens, feasible)


def _loss_bwd(blank, saved, g):
    logits, lse, posterior, logit_len, tokens, feasible = saved
    is_frame = jnp.arange(logits.shape[1]) < logit_len[:, None]
    scale = jnp.where(feasible, g, 0.0)[:, None] * is_frame  # [B, T]

    def row(logits, lse, posterior, tokens, scale):
        grad = scale[:, None] * jnp.exp(logits.astype(jnp.float32) - lse[:, None])
        own = scale[:, None] * posterior
        rest = scale - jnp.sum(own, axis=1)  # the blank has what the tokens leave
        return grad.at[:, tokens].add(-own).at[:, blank].add(-rest)

    grad = jax.vmap(row)(logits, lse, posterior.transpose(1, 0, 2), tokens, scale)
    grad = jnp.where(scale[:, :, None] != 0, grad, 0.0).astype(logits.dtype)
    others = (logit_len, tokens, logit_len, feasible)
    nothing = [np.zeros(x.shape, jax.dtypes.float0) for x in others]
    return (grad, *nothing)


_loss.defvjp(_loss_fwd, _loss_bwd)
