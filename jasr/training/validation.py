"""Word error rates of a task on a data set while it trains, on any mesh."""

import dataclasses

import jax
import numpy as np

from jasr import metrics, sharding, text, tree


def bounded(sources, shapes, accumulate, ways):
    """DataConfig whose batches hold no more audio than a micro-batch of the training `shapes`.

    One utterance for each of the `ways` that a batch is split is the least, however long it is.
    """
    most = max(rows * samples for rows, samples, _ in shapes) / accumulate
    return dataclasses.replace(
        sources,
        batch_multiple=ways,
        batch_duration=(most + 1) / sources.sample_rate,
        bucket_batch_size=(),
        bucket_duration_bins=(),
        num_buckets=len(shapes),
    )


def variables(state):
    """What is validated of a TrainState: the moving average if it keeps one."""
    params = tree.merge(state.ema or state.params, state.frozen)
    return {"params": params, "batch_stats": state.batch_stats}


def hypotheses(task, programs, data, mesh, variables, batches=0):
    """Greedy results of every utterance of `data`, on every process.

    Args:
      programs: {(B, S, L): `task.predict` compiled for such a batch}, one for each of data.shapes.
      data: what `data.open_eval` returns.
      batches: stop after so many batches; 0 = all.

    Returns:
      {index number: (hypothesis text, fast-weight updates or None if the model has none)}.
    """
    found = {}
    stream = data.iterate(jax.process_index(), jax.process_count())
    for number, batch in enumerate(stream):
        if batches and number == batches:
            break
        batch = sharding.put_batch(batch, mesh)
        out = programs[*batch["audio"].shape, batch["tokens"].shape[1]](variables, batch)
        rows = {k: out[k] for k in ("tokens", "token_len", "updates") if k in out}
        rows["index"] = batch["index"]
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            rows = multihost_utils.process_allgather(rows, tiled=True)
        rows = jax.device_get(rows)
        for row, index in enumerate(rows["index"]):
            if index >= 0:
                tokens = rows["tokens"][row, : rows["token_len"][row]]
                words = getattr(task, "text", task.tokenizer.decode)([int(t) for t in tokens])
                found[int(index)] = words, int(rows["updates"][row]) if "updates" in rows else None
    return found


def evaluate(task, programs, data, mesh, variables, batches=0):
    """Validation metrics: val_wer, val_cer, `sample` (True, Pred) texts, and of models with fast
    weights val_updates, the mean.

    Both sides go through the tokenizer's normalisation, as in `experiments.evaluate`.
    """
    found = hypotheses(task, programs, data, mesh, variables, batches)
    order = sorted(found)
    kind = task.tokenizer.normalisation
    refs = [text.normalise(data.texts[i], kind) for i in order]
    hyps = [text.normalise(found[i][0], kind) for i in order]
    result = metrics.wer(refs, hyps)
    updates = [found[i][1] for i in order if found[i][1] is not None]
    return {
        "val_wer": result["wer"],
        "val_cer": result["cer"],
        **({"val_updates": float(np.mean(updates))} if updates else {}),
        "sample": (refs[0], hyps[0]) if order else ("", ""),
    }
