"""RNN-T and TDT losses.

    log-probabilities at each node (`joint`) -> sum over all paths through them (`lattice`) -> loss

The losses apply the output layer of the joint network themselves, so that the logits of all nodes
never exist at once. `loss_of_logits` takes logits that do.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jasr.losses.joint import joint_cells, row_tokens
from jasr.losses.lattice import NEVER, log_likelihood, within


def rnnt_loss(enc, pred, kernel, bias, enc_len, tokens, token_len, *, blank, **joint):
    """Negative log-likelihood of each row's tokens under RNN-T, and whether any path gives them.

    A row with neither frames nor tokens is padding: feasible, with loss 0. A row with tokens but
    without frames is infeasible: loss 0 and gradient 0. Computed in float32 whatever comes in.

    Args:
      enc: f[B, T, J], the encoder's side of the joint network (`Joint.encoder_part`).
      pred: f[B, U + 1, J], the prediction network's side, of the start and of each token.
      kernel: f[J, V], bias: f[V], the output layer; blank and tokens are among its V outputs.
      enc_len: i32[B] valid frames.
      tokens: i32[B, U]; token_len: i32[B] valid tokens. What lies outside of the lengths, in `enc`
        and `pred` too, is not looked at.
      blank: id of the blank.
      joint: activation, dropout, key, fastemit_lambda, clamp, chunk and groups of `joint_cells`.
        FastEmit and the clamp change the gradient alone.

    Returns:
      loss f32[B] in nats and feasible bool[B].

    Raises:
      ValueError: shapes or settings do not fit each other.
    """
    rows = (enc_len, tokens, token_len)
    cells = joint_cells(enc, pred, kernel, bias, *rows, blank=blank, **joint)
    return _loss(cells, enc_len, token_len)


def tdt_loss(
    enc,
    pred,
    kernel,
    bias,
    enc_len,
    tokens,
    token_len,
    *,
    durations,
    blank,
    sigma=0.0,
    omega=0.0,
    **joint,
):
    """`rnnt_loss` of a token-and-duration transducer (Xu et al., 2023), with NeMo's options.

    A row is feasible if steps of the durations can end on its last frame: any row with frames, if
    0 and 1 are among the durations.

    Args:
      kernel: f[J, V + E], bias: f[V + E]; the last E outputs are the logits of the durations.
      durations: E numbers of frames, each once, at least one above 0.
      sigma: taken from the log-probability of every token, the blank too, so that paths of fewer
        and longer steps win. The loss contains it.
      omega: weight of the plain RNN-T loss of the token logits, without sigma; TDT has 1 - omega.
        A number is the expectation of what NeMo does, `sampled_omega(key, omega)` is what it does.
      The rest as in `rnnt_loss`. FastEmit and the clamp leave the durations' logits alone.
    """
    durations = check_durations(durations)
    rows, extra = (enc_len, tokens, token_len), len(durations)
    cells = joint_cells(enc, pred, kernel, bias, *rows, blank=blank, extra=extra, **joint)
    return _tdt(cells, enc_len, token_len, durations, sigma, omega)


def sampled_omega(key, omega):
    """1.0 with probability `omega`, else 0.0: NeMo's choice of the loss of one whole batch."""
    return (jax.random.uniform(key) < omega).astype(jnp.float32)


def has_path(enc_len, token_len, durations=None, *, frames=0, tokens=0):
    """bool[B]: so many frames i32[B] can be walked with so many tokens i32[B].

    RNN-T (no durations): any number of tokens in any number of frames but 0. TDT: a duration for
    each token and for one or more blanks, those above 0, sum to the frames. A row with neither
    frames nor tokens is padding, which counts as walked.

    Args:
      frames, tokens: the most of each, which durations without 0 or 1 need.
    """
    padding = (enc_len == 0) & (token_len == 0)
    if durations is None or {0, 1} <= set(durations):
        return padding | (enc_len > 0)
    return padding | jnp.asarray(_walks(tuple(durations), frames, tokens))[token_len, enc_len]


@functools.lru_cache(maxsize=64)
def _walks(durations, frames, tokens):
    """bool[tokens + 1, frames + 1]: whether u tokens and at least one blank can take t frames."""
    blanks = np.zeros(frames + 1, bool)
    for t in range(1, frames + 1):
        blanks[t] = any(d == t or (0 < d < t and blanks[t - d]) for d in durations)
    labels = np.zeros((tokens + 1, frames + 1), bool)
    labels[0, 0] = True
    for u in range(1, tokens + 1):
        for d in durations:
            labels[u, d:] |= labels[u - 1, : frames + 1 - d]
    later = np.arange(frames + 1)[None] - np.arange(frames + 1)[:, None]
    return labels @ (blanks[np.maximum(later, 0)] & (later > 0))


def loss_of_logits(
    logits,
    enc_len,
    tokens,
    token_len,
    *,
    blank,
    durations=None,
    sigma=0.0,
    omega=0.0,
    fastemit_lambda=0.0,
):
    """`rnnt_loss`, or with durations `tdt_loss`, of logits f[B, T, U + 1, V + E] that exist
    already; for tests and small outputs."""
    _, T, U1, outputs = logits.shape
    logits = logits.astype(jnp.float32)
    logits = jnp.where(within(T, U1, enc_len, token_len)[..., None], logits, 0.0)
    split = outputs - len(durations or ())
    token = jax.nn.log_softmax(logits[..., :split])
    own = row_tokens(tokens, token_len, blank)[:, None, :, None]
    label = jnp.take_along_axis(token, own, axis=-1, mode="clip")
    label += fastemit_lambda * (label - jax.lax.stop_gradient(label))
    timed = jax.nn.log_softmax(logits[..., split:])
    cells = jnp.concatenate([token[..., blank, None], label, timed], axis=-1)
    if durations is None:
        return _loss(cells, enc_len, token_len)
    return _tdt(cells, enc_len, token_len, check_durations(durations), sigma, omega)


def check_durations(durations, name="durations"):
    """The numbers of frames as a tuple; ValueError unless each comes once and one is above 0."""
    whole = all(isinstance(d, (int, np.integer)) and d >= 0 for d in durations)
    if not whole or not any(durations) or len(set(durations)) < len(durations):
        raise ValueError(
            f"{name} {durations!r}: must be whole numbers of frames, each once, one above 0"
        )
    return tuple(map(int, durations))


def _tdt(cells, enc_len, token_len, durations, sigma, omega):
    def timed(cells):
        return _loss(cells.at[..., :2].add(-sigma), enc_len, token_len, durations)

    def framed(cells):
        return _loss(cells[..., :2], enc_len, token_len)

    def nothing(cells):
        return jnp.zeros(cells.shape[0]), jnp.ones(cells.shape[0], bool)

    if isinstance(omega, (int, float)) and omega == 0:
        return timed(cells)
    omega = jax.lax.stop_gradient(jnp.asarray(omega, jnp.float32))
    # A draw of 0 or 1 needs only one of the two lattices.
    by_time, can_time = jax.lax.cond(omega < 1, timed, nothing, cells)
    by_frame, can_frame = jax.lax.cond(omega > 0, framed, nothing, cells)
    return (1 - omega) * by_time + omega * by_frame, can_time & can_frame


def _loss(cells, enc_len, token_len, durations=None):
    """Loss and feasibility; a likelihood that is not a number stays one and is not infeasible."""
    total = log_likelihood(cells, enc_len, token_len, durations)
    impossible = total <= NEVER / 2
    padding = (enc_len == 0) & (token_len == 0)
    return jnp.where(impossible, 0.0, -total), padding | ~impossible
