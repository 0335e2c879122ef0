"""Greedy CTC decoding with frame-accurate token times, and words with times in seconds."""

import jax
import jax.numpy as jnp


def ctc_greedy(logits, logit_len, blank=0):
    """Best-path tokens of each row, and the frames at which each one starts and ends.

    The best symbol of every frame, equal neighbours merged, blanks dropped (Graves et al., 2006,
    section 3.2). A token's frames are its run of equal symbols: from `start_frame` up to but not
    including `end_frame`. Frames after `logit_len` are not looked at, so neither padding nor the
    other rows of the batch change a row. Of equal logits the lowest id wins.

    Args:
      logits: f[B, T, V]; logit_len: i32[B] valid frames.
      blank: id of the blank.

    Returns:
      tokens i32[B, T], token_len i32[B], start_frame i32[B, T], end_frame i32[B, T]; zero after
      `token_len`.
    """
    B, T = logits.shape[:2]
    frames = jnp.arange(T, dtype=jnp.int32)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    best = jnp.where(frames < logit_len[:, None], best, blank)
    edge = jnp.full((B, 1), blank, jnp.int32)
    starts = (best != blank) & (best != jnp.concatenate([edge, best[:, :-1]], axis=1))
    ends = (best != blank) & (best != jnp.concatenate([best[:, 1:], edge], axis=1))
    number = jnp.cumsum(starts, axis=1, dtype=jnp.int32) - 1  # which token the frame belongs to

    @jax.vmap  # row by row, so that a batch sharded over devices stays where it is
    def collect(keep, number, values):
        slots = jnp.where(keep, number, T)  # T is outside: dropped
        return jnp.zeros(T, jnp.int32).at[slots].set(values, mode="drop")

    every = jnp.broadcast_to(frames, (B, T))
    return (
        collect(starts, number, best),
        jnp.sum(starts, axis=1, dtype=jnp.int32),
        collect(starts, number, every),
        collect(ends, number, every + 1),
    )


def words(tokenizer, tokens, start_frame, end_frame, seconds_per_frame, marks=frozenset()):
    """The words of one row as [{"word", "start", "end"}], times in seconds.

    Frame numbers are the only clock; this is the one place where they become seconds. A token
    whose piece begins with a space begins a word; pieces that are spaces alone only separate.

    Args:
      tokenizer: with `.piece(id)`, a leading space standing for a word's beginning, and
        `.decode(ids)`.
      tokens, start_frame, end_frame: sequences of equal length, without padding.
      marks: characters; a word that begins with one belongs to the word before it.
    """
    groups, open_word = [], False
    for token, start, end in zip(tokens, start_frame, end_frame, strict=True):
        piece = tokenizer.piece(int(token))
        open_word = open_word and not piece[:1].isspace()
        if piece.isspace() or not piece:
            continue
        if not open_word:
            groups.append(([], int(start)))
            open_word = True
        groups[-1] = ([*groups[-1][0], int(token)], groups[-1][1], int(end))
    found = []
    for ids, first, last in groups:
        word, end = tokenizer.decode(ids), round(last * seconds_per_frame, 4)
        if found and word[:1] in marks:
            found[-1] |= {"word": found[-1]["word"] + word, "end": end}
        else:
            start = round(first * seconds_per_frame, 4)
            found.append({"word": word, "start": start, "end": end})
    return found
