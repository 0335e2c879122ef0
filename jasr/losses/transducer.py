"""RNN-T and TDT losses.

    log-probabilities at each node (`joint`) -> sum over all paths through them (`lattice`) -> loss

The losses apply the output layer of the joint network themselves, so that the logits of all nodes
never exist at once. Those named `_of_logits` take logits that do, for tests and small outputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jasr.losses.joint import joint_cells, row_tokens, within
from jasr.losses.lattice import NEVER, log_likelihood


def rnnt_loss(
    enc,
    pred,
    kernel,
    bias,
    enc_len,
    tokens,
    token_len,
    *,
    blank,
    **joint,
):
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
    return _rnnt(cells, enc_len, token_len)


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
    durations = _durations(durations)
    rows = (enc_len, tokens, token_len)
    extra = len(durations)
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


def rnnt_loss_of_logits(logits, enc_len, tokens, token_len, *, blank, fastemit_lambda=0.0):
    """`rnnt_loss` of logits f[B, T, U + 1, V] that exist already; for tests and small outputs."""
    cells = _cells_of_logits(logits, enc_len, tokens, token_len, blank, 0)
    return _rnnt(_fastemit(cells, fastemit_lambda), enc_len, token_len)


def tdt_loss_of_logits(
    logits,
    enc_len,
    tokens,
    token_len,
    *,
    durations,
    blank,
    sigma=0.0,
    omega=0.0,
    fastemit_lambda=0.0,
):
    """`tdt_loss` of logits f[B, T, U + 1, V + E] that exist already."""
    durations = _durations(durations)
    cells = _cells_of_logits(logits, enc_len, tokens, token_len, blank, len(durations))
    return _tdt(_fastemit(cells, fastemit_lambda), enc_len, token_len, durations, sigma, omega)


def check_durations(durations, name="durations"):
    """Raises ValueError unless they are numbers of frames, each once, with one above 0."""
    whole = all(isinstance(d, (int, np.integer)) and d >= 0 for d in durations)
    if not whole or not any(durations) or len(set(durations)) < len(durations):
        raise ValueError(
            f"{name} {durations!r}: must be whole numbers of frames, each once, one above 0"
        )


def _durations(durations):
    check_durations(durations)
    return tuple(map(int, durations))


def _fastemit(cells, weight):
    """The cells with the gradient of the labels times 1 + weight."""
    if not weight:
        return cells
    label = cells[..., 1]
    return cells.at[..., 1].add(weight * (label - jax.lax.stop_gradient(label)))


def _rnnt(cells, enc_len, token_len):
    return _loss(log_likelihood(cells, enc_len, token_len), enc_len, token_len)


def _tdt(cells, enc_len, token_len, durations, sigma, omega):
    def tdt(cells):
        cells = cells.at[..., :2].add(-sigma)
        total = log_likelihood(cells, enc_len, token_len, durations)
        return _loss(total, enc_len, token_len)

    def rnnt(cells):
        return _rnnt(cells[..., :2], enc_len, token_len)

    if isinstance(omega, (int, float)) and omega == 0:
        return tdt(cells)

    def nothing(cells):
        return jnp.zeros(cells.shape[0]), jnp.ones(cells.shape[0], bool)

    omega = jax.lax.stop_gradient(jnp.asarray(omega, jnp.float32))
    # A draw of 0 or 1 needs only one of the two lattices.
    by_time, timed = jax.lax.cond(omega < 1, tdt, nothing, cells)
    by_frame, framed = jax.lax.cond(omega > 0, rnnt, nothing, cells)
    return (1 - omega) * by_time + omega * by_frame, timed & framed


def _loss(total, enc_len, token_len):
    """Loss and feasibility from log-likelihoods; not-a-number stays one and is not infeasible."""
    impossible = total <= NEVER / 2
    padding = (enc_len == 0) & (token_len == 0)
    return jnp.where(impossible, 0.0, -total), padding | ~impossible


def _cells_of_logits(logits, enc_len, tokens, token_len, blank, extra):
    _, T, U1, _ = logits.shape
    in_row = within(T, U1, enc_len, token_len)[..., None]
    logits = jnp.where(in_row, logits.astype(jnp.float32), 0.0)
    split = logits.shape[-1] - extra
    token = jax.nn.log_softmax(logits[..., :split])
    own = row_tokens(tokens, token_len, blank)[:, None, :, None]
    return jnp.concatenate(
        [
            token[..., blank, None],
            jnp.take_along_axis(token, own, axis=-1, mode="clip"),
            jax.nn.log_softmax(logits[..., split:]),
        ],
        axis=-1,
    )
