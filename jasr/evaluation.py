"""Word error rates of a task on a data set while it trains, on any mesh."""

import jax
import numpy as np

from jasr import metrics, sharding, text


def hypotheses(task, predict, data, mesh, variables, batches=0):
    """Greedy results of every utterance of `data`, on every process.

    Args:
      predict: jitted `task.predict`.
      data: what `data.open_eval` returns.
      batches: stop after so many batches; 0 = all.

    Returns:
      {index number: (hypothesis text, fast-weight updates)}.
    """
    found = {}
    stream = data.iterate(jax.process_index(), jax.process_count())
    for number, batch in enumerate(stream):
        if batches and number == batches:
            break
        out = predict(variables, sharding.put_batch(batch, mesh))
        rows = {k: out[k] for k in ("tokens", "token_len", "updates")}
        rows["index"] = sharding.put_batch({"index": batch["index"]}, mesh)["index"]
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            rows = multihost_utils.process_allgather(rows, tiled=True)
        rows = jax.device_get(rows)
        for tokens, length, updates, index in zip(
            rows["tokens"], rows["token_len"], rows["updates"], rows["index"], strict=True
        ):
            if index >= 0:
                words = task.tokenizer.decode([int(t) for t in tokens[:length]])
                found[int(index)] = (words, int(updates))
    return found


def evaluate(task, predict, data, mesh, variables, batches=0):
    """Validation metrics: val_wer, val_cer, val_updates (mean), and `sample` (True, Pred) texts.

    Both sides go through the tokenizer's normalisation, as in `experiments.evaluate`.
    """
    found = hypotheses(task, predict, data, mesh, variables, batches)
    order = sorted(found)
    kind = task.tokenizer.normalisation
    refs = [text.normalise(data.texts[i], kind) for i in order]
    hyps = [text.normalise(found[i][0], kind) for i in order]
    result = metrics.wer(refs, hyps)
    return {
        "val_wer": result["wer"],
        "val_cer": result["cer"],
        "val_updates": float(np.mean([found[i][1] for i in order])) if order else 0.0,
        "sample": (refs[0], hyps[0]) if order else ("", ""),
    }
