"""Heads with more tokens: the weights of an old vocabulary under a new one (pure, on numpy trees).

    params = expand(params, ("tdt", "ctc"), old.texts, merged.texts, durations=(0, 1, 2, 3, 4))

Rows of vocabulary tensors are moved by meaning: a piece's row goes to the id of the same string,
blank and durations stay behind the last piece, all bit for bit; rows of new pieces are made by a
named rule. Nothing else is touched. (NeMo's `change_vocabulary` draws the whole joint, embedding
and LSTM anew and turns a TDT loss into a plain RNN-T loss.)
A matrix product of another width may round old logits otherwise in their last bits.
"""

import dataclasses
import math
import zlib
from typing import NamedTuple

import jax
import numpy as np

from jasr import tree
from jasr.text.sentencepiece_model import duplicates, some

HEADS = ("ctc", "rnnt", "tdt")
RULES = ("normal", "zero_bias", "mean", "low")


class VocabularyError(ValueError):
    """Vocabularies, or vocabularies and weights, do not fit; the message lists everything."""


@dataclasses.dataclass(frozen=True)
class NewRows:
    """How the rows of new pieces are made.

    rule:
      "normal": as NeMo draws a fresh layer: embedding N(0, 1); joint U(+-1/sqrt J), kernel and
        bias; CTC kernel Xavier-uniform at the new size, bias U(+-1/sqrt D). New tokens may win
        before any training.
      "zero_bias": "normal", with biases of zero.
      "mean": the mean of the old pieces' rows, so that new logits are the mean of old ones.
      "low": "mean", with biases lower by `margin`: every new logit is at least `margin` below the
        largest old one whatever the input (rounding and noise apart), so that greedy transcripts
        stay as they were before training. Those of a beam search may change: the new tokens have a
        share in the probabilities.
    noise: for "mean" and "low": rows of kernels and embedding are spread around the mean by this
      share of the old rows' standard deviation. At 0 all new rows are equal until trained.
    margin: of "low", in natural-logarithm logits.
    """

    rule: str = "low"
    noise: float = 0.0
    margin: float = 3.0

    def __post_init__(self):
        if self.rule not in RULES:
            raise VocabularyError(f"no rule {self.rule!r} for new rows; choose from {RULES}")
        if not self.noise >= 0 or not self.margin > 0:
            raise VocabularyError(f"noise must be at least 0 and margin above 0: {self}")


class Tensor(NamedTuple):
    """A weight with a row for each token along its axis `rows`: the pieces, then `tail` others
    (blank, durations). `layer` is what NeMo initialises: "embedding", "linear" or "conv1d"."""

    path: str
    rows: int
    tail: int
    layer: str

    @property
    def is_bias(self):
        return self.path.endswith("/bias")


def tensors(heads, durations=()):
    """The vocabulary tensors of a model with these heads: NeMo's names in our spelling.

    Args:
      heads: ("ctc",), ("rnnt",), ("tdt",), or a hybrid's ("tdt", "ctc") or ("rnnt", "ctc").
      durations: TDT's durations.

    Raises:
      VocabularyError: no such set of heads, or durations that do not go with it.
    """
    heads, durations = (heads,) if isinstance(heads, str) else tuple(heads), tuple(durations)
    transducer = [h for h in heads if h in ("rnnt", "tdt")]
    if not heads or sorted(heads) != sorted({*heads} & {*HEADS}) or len(transducer) > 1:
        raise VocabularyError(
            f"a model has a CTC head, one transducer head, or both (of {', '.join(HEADS)}), "
            f"not {heads}"
        )
    if ("tdt" in heads) != bool(durations) or len(set(durations)) < len(durations):
        raise VocabularyError(
            f"a TDT head, and no other, has durations, each once: got {durations} for {heads}"
        )
    found = ()
    if transducer:
        found += (
            Tensor("decoder/prediction/embed/embedding", 0, 1, "embedding"),
            Tensor("joint/joint_net/kernel", -1, 1 + len(durations), "linear"),
            Tensor("joint/joint_net/bias", -1, 1 + len(durations), "linear"),
        )
    if "ctc" in heads:
        layer = f"{'ctc_decoder' if transducer else 'decoder'}/decoder_layers_0"
        found += tuple(Tensor(f"{layer}/{leaf}", -1, 1, "conv1d") for leaf in ("kernel", "bias"))
    return found


def moves(old, new):
    """i32[V]: the new id of each old id, found by piece string.

    Args:
      old, new: the pieces in order of their ids, without the blank.

    Raises:
      VocabularyError: pieces that occur twice or that the new vocabulary lacks; all in one error.
    """
    if problems := _vocabulary_problems(old, new):
        raise VocabularyError("the vocabularies do not fit: " + "; ".join(problems))
    ids = {piece: i for i, piece in enumerate(new)}
    return np.array([ids[piece] for piece in old], np.int32)


def expand(params, heads, old, new, *, durations=(), rows="low", key=None, replace=False):
    """The parameters with vocabulary rows for the pieces `new` instead of `old`.

    Args:
      params: tree with the tensors of `tensors(heads, durations)`: kernels [..., rows], biases
        [rows], embedding [rows, P] (with or, blank_as_pad false, without a row for the blank), of
        any float dtype. A moving average of them will do as well.
      heads, durations: see `tensors`.
      old, new: pieces in order of their ids, without the blank, which is the id behind the last.
      rows: NewRows, or the name of its rule.
      key: jax PRNG key, where rows are drawn ("normal", "zero_bias", noise above 0).
      replace: `new` is another vocabulary, not a larger one (NeMo's scenario B): no piece keeps
        its row, whatever its string. Blank, durations, LSTM and projections are kept.

    Returns:
      A new tree of the same structure and dtypes; leaves without vocabulary rows are the same
      objects. The blank's embedding row is zero, as in every NeMo model.

    Raises:
      VocabularyError: duplicate and missing pieces, missing tensors, sizes that do not fit,
        vocabulary tensors of heads that were not named; all in one error.
    """
    rows = NewRows(rows) if isinstance(rows, str) else rows
    wanted, flat = tensors(heads, durations), tree.flatten(params)
    problems = _vocabulary_problems(old, new, replace) + _tensor_problems(wanted, flat, len(old))
    if key is None and (rows.rule in ("normal", "zero_bias") or rows.noise):
        problems.append(f"{rows} draws random numbers and needs a key")
    if replace and rows.rule == "low":
        problems.append("rule 'low' keeps new tokens below old ones, of which replace leaves none")
    if problems:
        raise VocabularyError("the vocabulary cannot be changed: " + "; ".join(problems))
    kept = np.zeros(0, np.int32) if replace else moves(old, new)
    fresh = np.setdiff1d(np.arange(len(new)), kept)
    changed = {}
    for tensor in wanted:
        before = np.moveaxis(np.asarray(flat[tensor.path]), tensor.rows, 0)
        tail = before[len(old) :]
        after = np.zeros((len(new) + len(tail), *before.shape[1:]), before.dtype)
        after[kept] = before[: len(kept)]
        if tensor.layer != "embedding":  # there the tail is the blank's row: zero
            after[len(new) :] = tail
        shape, draw = (len(fresh), *after.shape[1:]), _generator(key, tensor.path)
        if rows.rule in ("mean", "low"):
            made = _mean_rows(tensor, before[: len(old)], shape, rows, draw)
        else:
            kernel = flat.get(f"{tensor.path.removesuffix('/bias')}/kernel", flat[tensor.path])
            inputs = math.prod(kernel.shape) // kernel.shape[tensor.rows]
            made = _drawn_rows(tensor, inputs, len(after), shape, rows, draw)
        after[fresh] = made.astype(before.dtype)
        changed[tensor.path] = np.ascontiguousarray(np.moveaxis(after, 0, tensor.rows))
    return tree.unflatten(flat | changed)


# ---- rows for new pieces -----------------------------------------------------------------------


def _mean_rows(tensor, old, shape, rows, draw):
    """f64 of `shape`: the mean of the old pieces' rows, spread or lowered as NewRows says."""
    old = old.astype(np.float64)
    mean = np.broadcast_to(old.mean(axis=0), shape)
    if tensor.is_bias:
        return mean - rows.margin if rows.rule == "low" else mean
    return mean + rows.noise * old.std(axis=0) * draw.standard_normal(shape) if rows.noise else mean


def _drawn_rows(tensor, inputs, outputs, shape, rows, draw):
    """f64 of `shape` as NeMo initialises a layer of so many inputs and outputs."""
    if tensor.layer == "embedding":
        return draw.standard_normal(shape)
    if tensor.is_bias and rows.rule == "zero_bias":
        return np.zeros(shape)
    xavier = tensor.layer == "conv1d" and not tensor.is_bias
    bound = math.sqrt(6 / (inputs + outputs) if xavier else 1 / inputs)
    return draw.uniform(-bound, bound, shape)


def _generator(key, path):
    """numpy's generator for one tensor: what it draws does not depend on what others there are.

    On the host, since jax would compile a program for every shape.
    """
    if key is None:
        return None
    words = np.asarray(jax.random.key_data(key)).ravel().tolist()
    return np.random.default_rng([*words, zlib.crc32(path.encode())])


# ---- what does not fit -------------------------------------------------------------------------


def _vocabulary_problems(old, new, replace=False):
    problems = []
    for name, pieces in (("old", old), ("new", new)):
        if twice := [repr(piece) for piece in duplicates(pieces)]:
            problems.append(f"the {name} vocabulary holds pieces more than once: {some(twice)}")
        if not len(pieces):
            problems.append(f"the {name} vocabulary is empty")
    missing = [] if replace else [repr(piece) for piece in sorted(set(old) - set(new))]
    if missing:
        problems.append(
            f"the new vocabulary lacks {len(missing)} of the old pieces: {some(missing)} (merge "
            "the tokenizers, or replace the vocabulary)"
        )
    return problems


def _tensor_problems(wanted, flat, size):
    problems = []
    for t in wanted:
        if t.path not in flat:
            problems.append(f"there is no {t.path}")
            continue
        shape = tuple(flat[t.path].shape)
        tails = (t.tail, 0) if t.layer == "embedding" else (t.tail,)  # 0: blank_as_pad false
        if len(shape) < (1 if t.is_bias else 2):
            problems.append(f"{t.path} has shape {shape}: too few axes")
        elif shape[t.rows] - size not in tails:
            durations = f" + {t.tail - 1} durations" if t.tail > 1 else ""
            problems.append(
                f"{t.path} {shape} has {shape[t.rows]} rows, wanted {size} pieces + blank"
                f"{durations} = {size + t.tail}"
            )
    every = {t.path for t in tensors(("tdt", "ctc"), (0,)) + tensors("ctc")}
    for path in sorted(every & set(flat) - {t.path for t in wanted}):
        problems.append(f"{path} belongs to a head that was not named")
    return problems
