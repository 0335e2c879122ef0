"""Word and character error rates with confidence intervals, and the writer of training metrics."""

import json
import math
import os
import pathlib
import sys
import time

import numpy as np


def wer(refs, hyps):
    """Corpus word and character error rates: all edits over all reference words or characters.

    Words are what whitespace separates; characters include the spaces between words. Texts are
    compared as they are: normalise before. Rates are fractions, inf if hypotheses have words but
    no reference does (as NeMo), 0.0 if neither has any.

    Returns:
      dict with wer, cer, words, chars, sub, ins, del (of words), word_errors, char_errors, and
      per_utterance: i64[N, 4] columns word errors, words, character errors, characters.
    """
    try:
        import jiwer
    except ImportError as e:
        raise ImportError("word error rates need jiwer: pip install jiwer") from e
    refs, hyps = [" ".join(r.split()) for r in refs], [" ".join(h.split()) for h in hyps]
    if len(refs) != len(hyps):
        raise ValueError(f"{len(refs)} references but {len(hyps)} hypotheses")
    counts = np.zeros((len(refs), 4), np.int64)
    sub = ins = dele = 0
    if refs:
        byword = jiwer.process_words(refs, hyps)
        bychar = jiwer.process_characters(refs, hyps)
        sub, ins, dele = byword.substitutions, byword.insertions, byword.deletions
        for column, out in ((0, byword), (2, bychar)):
            counts[:, column] = [_errors(chunks) for chunks in out.alignments]
            counts[:, column + 1] = [len(r) for r in out.references]
    total = counts.sum(axis=0)
    return {
        "wer": rate(total[0], total[1]),
        "cer": rate(total[2], total[3]),
        "words": int(total[1]),
        "chars": int(total[3]),
        "sub": int(sub),
        "ins": int(ins),
        "del": int(dele),
        "word_errors": int(total[0]),
        "char_errors": int(total[2]),
        "per_utterance": counts,
    }


def _errors(chunks):
    """Edits in one utterance's alignment."""
    edits = [c for c in chunks if c.type != "equal"]
    return sum(max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in edits)


def rate(errors, total):
    """errors / total; 0.0 for nothing of nothing, inf for something of nothing."""
    if total:
        return float(errors / total)
    return math.inf if errors else 0.0


def interval(errors, totals, *, level=0.95, samples=2000, seed=0):
    """(low, high) of a corpus error rate by bootstrap over utterances (Bisani & Ney, 2004).

    Utterances, not words, are drawn with replacement, since errors within one go together. The
    same counts and seed give the same interval.

    Args:
      errors, totals: i[N] errors and reference words (or characters) of each utterance.
    """
    errors, totals = np.asarray(errors, np.float64), np.asarray(totals, np.float64)
    if not len(errors) or not totals.sum():
        return (math.nan, math.nan)
    _, low, high = _bootstrap(errors, totals, level, samples, seed)
    return low, high


def compare(errors_a, errors_b, totals, *, level=0.95, samples=2000, seed=0):
    """Paired bootstrap of two systems on the same utterances (Bisani & Ney, 2004).

    Returns:
      dict: difference (rate of b less rate of a; negative = b is better), low, high of it, and
      p_better: share of the draws in which b makes fewer errors than a (ties count half).
    """
    a, b = np.asarray(errors_a, np.float64), np.asarray(errors_b, np.float64)
    totals = np.asarray(totals, np.float64)
    if not len(a) == len(b) == len(totals):
        raise ValueError(f"different numbers of utterances: {len(a)}, {len(b)}, {len(totals)}")
    if not totals.sum():
        return {"difference": math.nan, "low": math.nan, "high": math.nan, "p_better": math.nan}
    change, low, high = _bootstrap(b - a, totals, level, samples, seed)
    return {
        "difference": float((b - a).sum() / totals.sum()),
        "low": low,
        "high": high,
        "p_better": float(np.mean(change < 0) + 0.5 * np.mean(change == 0)),
    }


def _bootstrap(errors, totals, level, samples, seed):
    """(rates f64[samples] of bootstrap draws of utterances, the ends of their middle `level`)."""
    n = len(totals)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)
    drawn_errors, drawn_totals = (draws @ np.stack([errors, totals]).T).T
    rates = drawn_errors / np.maximum(drawn_totals, 1)
    tail = (1 - level) / 2
    low, high = np.quantile(rates, [tail, 1 - tail])
    return rates, float(low), float(high)


class Writer:
    """Writes a run's metrics: one console line and one line of metrics.jsonl each call.

    The console line goes to standard error. Each JSON line is written at once, so that a killed
    run leaves whole lines; a torn last one is dropped at the next start.

    Args:
      workdir: the run's directory; "" writes to the console only.
      resume_step: lines of later steps are removed (a resumed run repeats them); -1 keeps none.
      tensorboard: also write events under workdir/tensorboard (needs tensorboardX).
      quiet: nothing on the console.
    """

    def __init__(self, workdir="", *, resume_step=None, tensorboard=False, quiet=False):
        self.path = pathlib.Path(workdir) / "metrics.jsonl" if workdir else None
        self.quiet = quiet
        self._events = None
        self._start = time.monotonic()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _keep_lines(self.path, resume_step)
        if tensorboard and workdir:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as e:
                raise ImportError(
                    "TensorBoard events need tensorboardX: pip install tensorboardX"
                ) from e
            purge = None if resume_step is None else resume_step + 1
            self._events = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=purge)

    def write(self, step, values):
        """Records `{name: number or string}` for a step."""
        values = {k: _plain(v) for k, v in values.items()}
        if not self.quiet:
            print(console_line(step, values), file=sys.stderr, flush=True)
        if self.path is not None:
            row = {"step": int(step), "seconds": round(time.monotonic() - self._start, 3)}
            line = json.dumps({**row, **{k: _finite(v) for k, v in values.items()}})
            try:
                with open(self.path, "ab", buffering=0) as f:
                    f.write(line.encode() + b"\n")
            except OSError as e:  # a full disk must not end the run
                print(f"{self.path}: step {int(step)} not written: {e}", file=sys.stderr)
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(name, value, int(step))
                else:
                    self._events.add_text(name, str(value), int(step))
            self._events.flush()

    def close(self):
        if self._events is not None:
            self._events.close()


def console_line(step, values):
    """One line: the step, then each metric with four significant digits."""

    values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}
    return f"step {int(step)}  " + "  ".join(f"{k} {v}" for k, v in values.items())


def _plain(value):
    """A Python number, string, list or dict of a numpy or jax value."""
    if isinstance(value, (str, bool, int, float, list, dict)) or value is None:
        return value
    return np.asarray(value).tolist()


def _finite(value):
    """JSON has no NaN and no infinity: those become strings."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _keep_lines(path, resume_step):
    """Drops a torn last line and, if resuming, the lines of steps after `resume_step`."""
    if not path.exists():
        return
    last = math.inf if resume_step is None else resume_step

    def keeps(line):
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= last
        except (ValueError, KeyError, TypeError):
            return False

    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if keeps(line)]
    if kept != lines:
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)


def progress(iterable, *, total=None, label=""):
    """`iterable` with a progress bar on standard error where that is a terminal, else as it is."""
    if not sys.stderr.isatty():
        return iterable
    from tqdm import tqdm

    return tqdm(iterable, total=total, desc=label, leave=False, file=sys.stderr)
