"""Measurements that several systems make of a set: error rates of transcripts, the loss."""

import numpy as np

from jasr import metrics, text
from jasr.seam import Validator


def transcripts(tokenizer, decode, predict, means=()):
    """The Validator of word and character error rates.

    Both sides go through the tokenizer's normalisation, as in `experiments.evaluate`.

    Args:
      tokenizer: with `normalisation`.
      decode: token ids -> text.
      predict: (variables, batch) -> {"tokens" i32[B,L], "token_len" i32[B], other columns [B]}.
      means: columns of `predict` whose means are metrics, too.
    """
    names = ("tokens", "token_len", *means)

    def run(variables, batch, key):
        found = predict(variables, batch)
        return {name: found[name] for name in names}

    def score(rows, items):
        order = sorted(rows)
        found, refs, hyps = text.text_scores(
            [items[i].fields["text"] for i in order],
            [decode([int(t) for t in rows[i]["tokens"][: rows[i]["token_len"]]]) for i in order],
            tokenizer.normalisation,
        )
        result = {"wer": found["wer"], "cer": found["cer"]}
        result |= {name: float(np.mean([rows[i][name] for i in order])) for name in means if order}
        sample = f"True: {refs[0]}\nPred: {hyps[0]}" if order else ""
        one = metrics.wer(refs[:1], hyps[:1])["wer"] if order else float("nan")
        return result, [sample, f"WER: {one:.2%}"] if order else []

    return Validator(("wer", "cer", *means), run, score)


def loss(row_losses):
    """The Validator of the loss without augmentation and dropout.

    row_losses: (variables, batch) -> {name: (f32[B] values, f32[B] counts)}; the loss is the sum
      over the names of the values' sum by the counts' sum, over the whole set.
    """

    def run(variables, batch, key):
        found = row_losses(variables, batch)
        return {f"{k} {part}": v for k, pair in found.items() for part, v in zip((0, 1), pair)}

    def score(rows, items):
        names = sorted({name[:-2] for row in rows.values() for name in row})
        sums = {
            name: [sum(float(row[f"{name} {part}"]) for row in rows.values()) for part in (0, 1)]
            for name in names
        }
        return {"loss": sum(value / max(count, 1.0) for value, count in sums.values())}, []

    return Validator(("loss",), run, score)
