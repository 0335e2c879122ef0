"""Beam search of RNN-T and TDT inside jit: synchronous in frames, equal prefixes merged.

A row's hypotheses stand at frames of their own, since a TDT's durations differ. A turn extends
those at the row's earliest frame by one symbol each and keeps the best of these and of the ones
that wait further on; so hypotheses of one prefix meet at a frame before either goes on, and their
probabilities add up (adaptive expansion search, Kim et al., 2020, with durations). The greedy path
is never dropped: a beam of one is greedy decoding, and a wider one does not end below it.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np

from jasr.decoding.transducer import batch_axes, result, take_rows

NOTHING = -1e30  # log-probability of what is not there; sums of some stay finite


class _Hypotheses(typing.NamedTuple):
    """The hypotheses of each row: the greedy path's, then the others from the best on."""

    score: jax.Array  # f32[B, K] log-probability of the prefix up to its frame
    t: jax.Array  # i32[B, K] the frame that it looks at next
    count: jax.Array  # i32[B, K] labels
    prefix: jax.Array  # u32[B, K, 2] hashes of the labels
    node: jax.Array  # i32[B, K] the last label in the tree, -1 before the first
    greedy: jax.Array  # bool[B, K]
    full: jax.Array  # bool[B, K]

    @property
    def there(self):
        """bool[B, K]; false where there are fewer hypotheses than K."""
        return self.score > NOTHING / 2


class _Arcs(typing.NamedTuple):
    """How a hypothesis may go on: by waiting, M labels or the blank, with E durations each.

    Their numbers: 0 waiting, from 1 labels with durations, from 1 + M * E blanks with durations.
    An RNN-T has one "duration", no frames for labels and one for blanks.
    """

    M: int
    label_hops: np.ndarray  # i32[E] frames
    blank_hops: np.ndarray  # i32[E]; blanks of zero frames do not exist

    @property
    def E(self):
        return len(self.label_hops)

    @property
    def hops(self):
        """i32[1 + M * E + E] frames of every arc."""
        return np.concatenate([[0], np.tile(self.label_hops, self.M), self.blank_hops])

    @property
    def shortest(self):
        """The number among durations of the shortest that a blank may have."""
        return int(np.argmin(np.where(self.blank_hops > 0, self.blank_hops, 1 << 30)))


class _Heard(typing.NamedTuple):
    """What the joint says of each hypothesis at its frame; log-probabilities f32."""

    label: jax.Array  # [B, K, M] of the best labels
    token: jax.Array  # i32[B, K, M] these labels
    blank: jax.Array  # [B, K]
    duration: jax.Array  # [B, K, E]


class _Carry(typing.NamedTuple):
    hyps: _Hypotheses
    at: jax.Array  # i32[B] the frame of the last turn
    labels_here: jax.Array  # i32[B] labels that the hypotheses still there have emitted there
    prediction: jax.Array  # f[B * K, J]
    state: typing.Any
    tree: jax.Array  # i32[B, S, K, 4] of each label its parent, token, frame and duration
    level: jax.Array  # i32, of S in use


def beam_search(
    enc_proj,
    enc_len,
    steps,
    *,
    blank,
    durations=None,
    beam=4,
    max_symbols=10,
    expansion_gamma=2.3,
    capacity=None,
    length_normalised=True,
):
    """The most probable label sequences of each row, best first.

    The probability of a sequence is the sum over its paths through the frames: a label stays at its
    frame (TDT: goes on by a duration), a blank goes on by one (TDT: by a duration above zero), and
    a path ends with the step that leaves the audio. With a beam wide enough for all prefixes and an
    infinite `expansion_gamma` nothing is left out.

    Args:
      enc_proj, enc_len, steps, blank, durations, capacity: as for `transducer.greedy`.
      beam: K, hypotheses of a row.
      max_symbols: most labels at one frame, as `transducer.greedy`'s "greedy_batch".
      expansion_gamma: symbols (TDT: with durations) whose log-probability is further than this
        below a hypothesis's best are not tried; 2.3, a tenth, is the paper's.
      length_normalised: order the sequences by score / labels.

    Returns:
      `transducer.greedy`'s dict with a second axis of K sequences: tokens i32[B, K, L], token_len
      i32[B, K] ... Frames are those of one path; score f32[B, K] is the log-probability of labels,
      blanks and durations together, not divided, -inf where there is no further sequence.
    """
    if beam < 1 or max_symbols < 1 or expansion_gamma < 0:
        raise ValueError(
            f"beam ({beam}) and max_symbols ({max_symbols}) must be at least 1, "
            f"expansion_gamma ({expansion_gamma}) not negative"
        )
    if durations is not None and max(durations) < 1:
        raise ValueError(f"blanks need a duration above zero, got {durations}")
    B, T, _ = enc_proj.shape
    K, S = beam, T * (max_symbols + 1) + 1  # a row's most turns, and one for the others'
    L = T * max_symbols if capacity is None else capacity
    hops = durations or (0,), durations or (1,)
    arcs = _Arcs(min(K, blank), *(np.array(x, np.int32) for x in hops))
    axes = batch_axes(steps.initial_state)
    frames = jnp.pad(enc_proj, ((0, 0), (0, 1), (0, 0)))
    chunk = min(max(B, 8), B * K)

    def turn(c):
        hyps = c.hyps
        at = _earliest(hyps, enc_len)
        labels_here = jnp.where(at == c.at, c.labels_here + 1, 0)
        active = hyps.there & (hyps.t == at[:, None]) & (at < enc_len)[:, None]
        frame = jnp.take_along_axis(frames, jnp.minimum(at, T)[:, None, None], axis=1)[:, 0]
        heard = _look(steps, active, frame, c.prediction, blank, arcs, chunk)

        stay = active & (labels_here < max_symbols)[:, None]  # may have a label here
        room = hyps.count < L
        full = hyps.full | (stay & ~room & (heard.label[..., 0] >= heard.blank))
        left = enc_len[:, None] - hyps.t
        may = (active, left, stay & room, ~stay)
        score, greedy = _extend(hyps, heard, arcs, *may, expansion_gamma)
        hyps = hyps._replace(full=full)
        hyps, parent, token, hop = _select(hyps, score, greedy, heard.token, arcs, enc_len)
        emit = token >= 0
        new = (hyps.node, token, jnp.broadcast_to(at[:, None], token.shape), hop)
        entry = jnp.stack(new, axis=-1)[:, None]
        node = jnp.where(emit, c.level * K + jnp.arange(K), hyps.node)
        state, prediction = _advance(steps, axes, parent, token, emit, c, chunk)
        return _Carry(
            hyps._replace(node=node),
            at,
            labels_here,
            prediction,
            state,
            jax.lax.dynamic_update_slice_in_dim(c.tree, entry, c.level, axis=1),
            c.level + jnp.any(emit),
        )

    first = jnp.full((B * K,), blank, jnp.int32)
    prediction, state = steps.predict(first, steps.initial_state(B * K))
    greedy, zero = jnp.broadcast_to(jnp.arange(K) == 0, (B, K)), jnp.zeros((B, K), jnp.int32)
    start = _Hypotheses(  # one empty hypothesis a row
        score=jnp.where(greedy, 0.0, NOTHING),
        t=zero,
        count=zero,
        prefix=jnp.zeros((B, K, 2), jnp.uint32),
        node=zero - 1,
        greedy=greedy,
        full=jnp.zeros((B, K), bool),
    )
    row = zero[:, 0]
    tree = jnp.zeros((B, S, K, 4), jnp.int32)
    c = _Carry(start, row - 1, row, prediction, state, tree, jnp.int32(0))
    c = jax.lax.while_loop(lambda c: jnp.any(_earliest(c.hyps, enc_len) < enc_len), turn, c)
    hyps, emitted = _ranked(c, L, length_normalised)
    score, full = jnp.where(hyps.there, hyps.score, -jnp.inf), hyps.full
    rows = (hyps.count, jnp.repeat(enc_len, K), score, full)
    flat = result(emitted.reshape(B * K, L, 3), *(x.reshape(-1) for x in rows), durations)
    return {name: x.reshape(B, K, *x.shape[1:]) for name, x in flat.items()}


def _earliest(hyps, enc_len):
    """i32[B] the first frame at which a hypothesis stands; enc_len if all are through."""
    return jnp.min(jnp.where(hyps.there, hyps.t, enc_len[:, None]), axis=1)


def _look(steps, active, frame, prediction, blank, arcs, chunk):
    """_Heard of the active hypotheses, each at its row's frame f[B, J]; NOTHING of the others."""
    B, K = active.shape

    def joint(n):
        logits = steps.output(frame[n // K], prediction[n]).astype(jnp.float32)
        log_probs = jax.nn.log_softmax(logits[:, : blank + 1], axis=-1)
        label, token = jax.lax.top_k(log_probs[:, :blank], arcs.M)
        duration = jnp.zeros((len(n), 1))
        if logits.shape[1] > blank + 1:
            duration = jax.nn.log_softmax(logits[:, blank + 1 :], axis=-1)
        return _Heard(label, token, log_probs[:, blank], duration)

    nothing = _Heard(
        jnp.full((B * K, arcs.M), NOTHING),
        jnp.zeros((B * K, arcs.M), jnp.int32),
        jnp.full((B * K,), NOTHING),
        jnp.full((B * K, arcs.E), NOTHING),
    )
    heard = _for_rows(joint, active.reshape(-1), nothing, _Heard(0, 0, 0, 0), chunk)
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), heard)


def _extend(hyps, heard, arcs, active, left, label_ok, forced, gamma):
    """(scores f32[B, K, A] of all arcs of each hypothesis, whether they are the greedy path's).

    Those that are not active wait. `left` i32[B, K] are the frames from each to the end, label_ok
    bool[B, K] may have a label, `forced` must go on by one. The greedy path is
    `transducer.greedy`'s, in which a blank of duration zero goes on by one too.
    """
    B, K, M, E = *active.shape, arcs.M, arcs.E
    duration, last = _clipped(heard.duration, arcs.blank_hops, left)
    labels = heard.label[..., None] + duration[:, :, None, :]
    labels = jnp.where(label_ok[..., None], labels.reshape(B, K, M * E), NOTHING)
    blanks = jnp.where(arcs.blank_hops > 0, heard.blank[..., None] + duration, NOTHING)
    arc = jnp.concatenate([labels, blanks], axis=-1)

    best = jnp.argmax(heard.duration, axis=-1)
    goes_on = ~forced & (jnp.asarray(arcs.blank_hops)[best] > 0)
    one = jnp.where(arcs.blank_hops[arcs.shortest] < left, arcs.shortest, last)
    follow = jnp.where(
        label_ok & (heard.label[..., 0] >= heard.blank), best, M * E + jnp.where(goes_on, best, one)
    )
    follow = hyps.greedy[..., None] & (jnp.arange(M * E + E) == follow[..., None])

    kept = follow | (arc >= jnp.max(arc, axis=-1, keepdims=True) - gamma)
    extended = jnp.where(active[..., None] & kept, hyps.score[..., None] + arc, NOTHING)
    waiting = jnp.where(active, NOTHING, hyps.score)
    return (
        jnp.concatenate([waiting[..., None], extended], axis=-1),
        jnp.concatenate([(hyps.greedy & ~active)[..., None], follow & active[..., None]], axis=-1),
    )


def _clipped(duration, hops, left):
    """Log-probabilities f32[B, K, E] of durations, those that leave the audio as one.

    It is the most probable of them, whose numbers i32[B, K] are the second result.
    """
    leaves = hops >= left[..., None]
    leaving = jnp.where(leaves, duration, NOTHING)
    last = jnp.argmax(leaving, axis=-1)
    is_last = leaves & (jnp.arange(len(hops)) == last[..., None])
    total = jax.nn.logsumexp(leaving, axis=-1, keepdims=True)
    return jnp.where(is_last, total, jnp.where(leaves, NOTHING, duration)), last


def _select(hyps, score, greedy, best_tokens, arcs, enc_len):
    """The K best of all extensions, those of one prefix at one frame merged.

    Returns the hypotheses, with their parents' nodes; parent i32[B, K] among the old ones; token
    i32[B, K], -1 where no label is new; its duration i32[B, K].
    """
    K, A = score.shape[1:]
    ME = arcs.M * arcs.E

    @jax.vmap
    def pick(hyps, score, greedy, best_tokens, length):
        rank = jnp.where(greedy, jnp.inf, score).reshape(-1)
        _, arc = jax.lax.top_k(rank, min(2 * K, K * A))
        parent, number = arc // A, arc % A
        is_label = (number >= 1) & (number <= ME)
        token = best_tokens[parent, jnp.clip(number - 1, 0, ME - 1) // arcs.E]
        hop = jnp.asarray(arcs.hops, jnp.int32)[number]
        new = jax.tree.map(lambda x: x[parent], hyps)
        new = new._replace(
            score=score.reshape(-1)[arc],
            greedy=greedy.reshape(-1)[arc],
            t=jnp.minimum(new.t + hop, length),
            count=new.count + is_label,
            prefix=jnp.where(is_label[:, None], _longer(new.prefix, token), new.prefix),
        )
        new = new._replace(score=_merged(new))
        _, order = jax.lax.top_k(jnp.where(new.greedy, jnp.inf, new.score), K)
        extras = parent, jnp.where(is_label, token, -1), hop
        return jax.tree.map(lambda x: x[order], (new, *extras))

    return pick(hyps, score, greedy, best_tokens, enc_len)


def _longer(prefix, token):
    """The hashes u32[N, 2] of prefixes with one more token i32[N]."""
    mixed = prefix ^ (token[:, None] + 1).astype(jnp.uint32)
    mixed *= jnp.array([0x9E3779B1, 0x85EBCA77], jnp.uint32)
    return mixed ^ (mixed >> jnp.array([15, 13], jnp.uint32))


def _merged(hyps):
    """Scores of hypotheses [N] of a row: the sum in the first of each prefix and frame."""
    same = (hyps.t[:, None] == hyps.t) & (hyps.count[:, None] == hyps.count)
    same &= jnp.all(hyps.prefix[:, None] == hyps.prefix, axis=-1)
    same &= hyps.there[:, None] & hyps.there
    first = ~jnp.any(jnp.tril(same, -1), axis=1)
    total = jax.nn.logsumexp(jnp.where(same, hyps.score, NOTHING), axis=1)
    return jnp.where(first & hyps.there, total, NOTHING)


def _advance(steps, axes, parent, token, emit, c, chunk):
    """(state, prediction) of the hypotheses: their parents', after the token where one is new."""
    B, K = parent.shape
    source = (jnp.arange(B)[:, None] * K + parent).reshape(-1)
    token = token.reshape(-1)

    def predict(n):
        return steps.predict(token[n], take_rows(source[n], axes, c.state))

    kept = c.prediction[source], take_rows(source, axes, c.state)
    prediction, state = _for_rows(predict, emit.reshape(-1), kept, (0, axes), chunk)
    return state, prediction


def _for_rows(function, which, rows, axes, chunk):
    """`rows`, a tree of arrays of N rows, with function(i32[chunk]) in those of which bool[N].

    Some at a time and no more than needed: of a beam's hypotheses few have anything new.
    """
    N = which.shape[0]
    numbers = jnp.nonzero(which, size=-(-N // chunk) * chunk, fill_value=N)[0]
    last = jnp.sum(which)

    def some(c):
        done, rows = c
        n = jax.lax.dynamic_slice_in_dim(numbers, done, chunk)
        new = function(jnp.minimum(n, N - 1))

        def put(axis, old, new):
            where = (slice(None),) * axis + (n,)
            return old.at[where].set(new, mode="drop")

        return done + chunk, jax.tree.map(put, axes, rows, new)

    return jax.lax.while_loop(lambda c: c[0] < last, some, (jnp.zeros((), last.dtype), rows))[1]


def _ranked(c, L, length_normalised):
    """(hypotheses from the best on, their labels i32[B, K, L, 3]: token, frame, duration)."""
    B, S, K, _ = c.tree.shape
    key = c.hyps.score / (jnp.maximum(c.hyps.count, 1) if length_normalised else 1)
    order = jnp.argsort(jnp.where(c.hyps.there, -key, jnp.inf), axis=1)
    hyps = jax.vmap(lambda tree, n: jax.tree.map(lambda x: x[n], tree))(c.hyps, order)
    hyps = hyps._replace(count=jnp.where(hyps.there, hyps.count, 0))
    tree = c.tree.reshape(B, S * K, 4)
    b, k = jnp.arange(B)[:, None], jnp.arange(K)

    def back(c):
        node, slot, emitted = c
        entry = tree[b, jnp.maximum(node, 0)]
        at = jnp.where(slot >= 0, slot, L)  # L is outside: dropped
        emitted = emitted.at[b, k, at].set(entry[..., 1:], mode="drop")
        return entry[..., 0], slot - 1, emitted

    c = hyps.node, hyps.count - 1, jnp.zeros((B, K, L, 3), jnp.int32)
    return hyps, jax.lax.while_loop(lambda c: jnp.any(c[1] >= 0), back, c)[2]
