"""Greedy decoding of RNN-T and TDT: one loop over labels inside jit, every row at its own frame.

A turn of the loop looks at a window of frames of each row under the row's present prediction, walks
over blanks to the first label, and runs the prediction network for the rows that found one. Rows
never wait for each other, and what a row yields does not depend on who else is in the batch.
"""

import typing

import jax
import jax.numpy as jnp

STRATEGIES = ("greedy_batch", "greedy")
NORMALISATIONS = ("tokens", "all")
WINDOWS = {"rnnt": 4, "tdt": 1}  # frames: RNN-T's labels stand further apart than TDT's steps


class Steps(typing.NamedTuple):
    """A transducer as the decoders see it: pure functions of rows, whatever their number N.

    predict: (token i32[N], state) -> (f[N, J], state), the prediction network after one more token,
      through the joint's projection; the blank stands for the start of a text.
    initial_state: N -> state, a tree of arrays with one axis of N rows each, anywhere.
    output: (f[N, J], f[N, J]) -> logits f[N, V + 1 + E] of encoder and prediction projections:
      labels, blank, and for TDT one for each duration.
    """

    predict: typing.Callable
    initial_state: typing.Callable
    output: typing.Callable


class _Carry(typing.NamedTuple):
    t: jax.Array  # i32[B] the frame each row looks at next
    labels_here: jax.Array  # i32[B] labels that it has emitted there
    prediction: jax.Array  # f[B, J]
    state: typing.Any
    emitted: jax.Array  # i32[B, L, 3] token, frame, duration
    count: jax.Array  # i32[B]
    score: jax.Array  # f32[B]
    full: jax.Array  # bool[B]


def greedy(
    enc_proj,
    enc_len,
    steps,
    *,
    blank,
    durations=None,
    max_symbols=10,
    strategy="greedy_batch",
    capacity=None,
    window=None,
    normalise_over="tokens",
):
    """The best symbol at every step of each row (Graves, 2012; Xu et al., 2023, for TDT).

    An RNN-T stays at a frame after a label and goes on by one after a blank; a TDT goes on by the
    best duration, after a blank by one at least. `max_symbols` keeps a row from staying for ever,
    as NeMo does it: under "greedy_batch" (label looping, NeMo's default) a row that has emitted so
    many labels at a frame and is still there goes on by one; "greedy" is NeMo's loop over single
    utterances, in which a TDT's blanks count too and the extra frame comes on top of the duration.
    For RNN-T they are the same. Of equal logits the lowest id wins.

    Args:
      enc_proj: f[B, T, J] encoder frames through the joint's projection; enc_len: i32[B].
      steps: the transducer's Steps.
      blank: id of the blank, which follows the labels.
      durations: a TDT's durations in the order of its outputs, e.g. (0, 1, 2, 3, 4); None: RNN-T.
      max_symbols: None for no limit.
      capacity: L, the most tokens of a row; T * max_symbols if None, which is always enough (10 T
        without max_symbols).
      window: frames looked at in one turn; does not change results.
      normalise_over: "tokens" scores labels by their log-probability among labels and blank; "all"
        by the one among all outputs, durations too, as NeMo reports it on CPUs.

    Returns:
      dict of tokens i32[B, L], token_len i32[B], start_frame, end_frame, durations i32[B, L] (zero
      after token_len), score f32[B] (sum of the labels' log-probabilities) and full bool[B]: the
      row had another label than the capacity allows and stopped there. A label's frames go from the
      one at which it was emitted to its duration later (RNN-T: one), at most to enc_len;
      `durations` are as predicted.
    """
    for name, value, known in (
        ("strategy", strategy, STRATEGIES),
        ("normalise_over", normalise_over, NORMALISATIONS),
    ):
        if value not in known:
            raise ValueError(f"no {name} {value!r}; choose from {', '.join(known)}")
    if max_symbols is not None and max_symbols < 1:
        raise ValueError(f"max_symbols must be at least 1 or None, got {max_symbols}")
    B, T, _ = enc_proj.shape
    W = window or WINDOWS["rnnt" if durations is None else "tdt"]
    L = capacity if capacity is not None else T * (max_symbols or 10)
    rows, ahead = jnp.arange(B), jnp.arange(W, dtype=jnp.int32)
    axes = batch_axes(steps.initial_state)
    padded = jnp.pad(enc_proj, ((0, 0), (0, W), (0, 0)))
    table = None if durations is None else jnp.asarray(durations, jnp.int32)
    quirk = strategy == "greedy" and durations is not None

    def turn(c):
        live = (c.t < enc_len) & ~c.full
        frames = jax.vmap(lambda x, t: jax.lax.dynamic_slice_in_dim(x, t, W))(padded, c.t)
        logits = steps.output(
            frames.reshape(B * W, -1),
            jnp.repeat(c.prediction, W, axis=0, total_repeat_length=B * W),
        )
        logits = logits.astype(jnp.float32).reshape(B, W, -1)
        is_label = jnp.max(logits[..., :blank], axis=-1) >= logits[..., blank]
        if table is None:
            duration = jnp.where(is_label, 0, 1)
        else:
            duration = table[jnp.argmax(logits[..., blank + 1 :], axis=-1)]
        hop = jnp.maximum(duration, 1)
        if quirk:
            labels_at = jnp.where(ahead == 0, c.labels_here[:, None], 0)
            hop += (labels_at + 1 == max_symbols) & (duration > 0)
        inside = c.t[:, None] + ahead < enc_len[:, None]
        offset = _walk(jnp.where(inside & ~is_label & live[:, None], hop, 0))
        here = (ahead == offset[:, None]) & inside & is_label & live[:, None]
        found = jnp.any(here, axis=1)

        t = c.t + offset
        chosen = jnp.take_along_axis(logits, jnp.minimum(offset, W - 1)[:, None, None], 1)[:, 0]
        best = jnp.max(chosen[:, :blank], axis=-1)
        token = _first(chosen[:, :blank] == best[:, None])
        duration = jnp.sum(jnp.where(here, duration, 0), axis=1)
        emit = found & (c.count < L)
        slot = jnp.where(emit, c.count, L)  # L is outside: dropped
        emitted = c.emitted.at[rows, slot].set(
            jnp.stack([token, t, duration], axis=-1), mode="drop"
        )
        among = chosen if normalise_over == "all" else chosen[:, : blank + 1]
        log_prob = best - jax.nn.logsumexp(among, axis=-1)

        labels_here = jnp.where(offset == 0, c.labels_here, 0) + emit
        onward = duration
        if max_symbols is not None:
            onward += (labels_here >= max_symbols) & (quirk | (duration == 0))
        onward = jnp.where(emit, onward, 0)

        def predict():
            prediction, state = steps.predict(token, c.state)
            new = where_rows(emit, axes, state, c.state)
            return new, jnp.where(emit[:, None], prediction, c.prediction)

        state, prediction = jax.lax.cond(jnp.any(emit), predict, lambda: (c.state, c.prediction))
        return _Carry(
            t + onward,
            jnp.where(onward > 0, 0, labels_here),
            prediction,
            state,
            emitted,
            c.count + emit,
            c.score + jnp.where(emit, log_prob, 0.0),
            c.full | (found & ~emit),
        )

    first, zero = jnp.full((B,), blank, jnp.int32), jnp.zeros((B,), jnp.int32)
    prediction, state = steps.predict(first, steps.initial_state(B))
    c = _Carry(
        t=zero,
        labels_here=zero,
        prediction=prediction,
        state=state,
        emitted=jnp.zeros((B, L, 3), jnp.int32),
        count=zero,
        score=jnp.zeros((B,), jnp.float32),
        full=jnp.zeros((B,), bool),
    )
    c = jax.lax.while_loop(lambda c: jnp.any((c.t < enc_len) & ~c.full), turn, c)
    return result(c.emitted, c.count, enc_len, c.score, c.full, durations)


def _first(found):
    """The first place in each row where found bool[B, V] holds, i32[B]; V where none does.

    With a maximum in two passes it takes XLA's CPU compiler a fifth of the time of an argmax.
    """
    V = found.shape[1]
    return jnp.min(jnp.where(found, jnp.arange(V, dtype=jnp.int32), V), axis=1)


def _walk(hop):
    """Where each row stops, i32[B]: from 0 on by hop i32[B, W] until it is 0 or the window ends."""
    W = hop.shape[1]
    ahead = jnp.arange(W, dtype=jnp.int32)
    offset = jnp.zeros(hop.shape[0], jnp.int32)
    for _ in range(W):
        offset += jnp.sum(jnp.where(ahead == offset[:, None], hop, 0), axis=1)
    return offset


def result(emitted, count, enc_len, score, full, durations):
    """The decoders' dict of i32[B, L, 3] (token, frame, duration), zero after count i32[B]."""
    token, start, duration = jnp.moveaxis(emitted, -1, 0)
    lasting = duration if durations is not None else jnp.ones_like(start)
    end = jnp.minimum(start + lasting, enc_len[:, None])
    there = jnp.arange(token.shape[1]) < count[:, None]
    return {
        "tokens": token,
        "token_len": count,
        "start_frame": start,
        "end_frame": jnp.where(there, end, 0),
        "durations": duration,
        "score": score,
        "full": full,
    }


def batch_axes(initial_state):
    """The tree of the states' axes of rows, found from the shapes for two and three rows."""

    def axis(two, three):
        changed = [i for i, (m, n) in enumerate(zip(two.shape, three.shape, strict=True)) if m != n]
        if len(changed) != 1:
            raise ValueError(f"a state needs one axis of rows, got {two.shape} for two rows")
        return changed[0]

    two, three = (jax.eval_shape(lambda n=n: initial_state(n)) for n in (2, 3))
    return jax.tree.map(axis, two, three)


def where_rows(which, axes, new, old):
    """`new` states in the rows where which bool[N] holds, `old` elsewhere."""

    def choose(axis, new, old):
        rows = which.reshape([-1 if i == axis else 1 for i in range(new.ndim)])
        return jnp.where(rows, new, old)

    return jax.tree.map(choose, axes, new, old)


def take_rows(rows, axes, states):
    """The states of rows i32[n]."""
    return jax.tree.map(lambda axis, x: jnp.take(x, rows, axis=axis), axes, states)
