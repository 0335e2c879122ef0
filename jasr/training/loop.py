"""What the training loop is made of: batches and programs of a bucket, a line of metrics, and what
all processes check together."""

import contextlib
import json
import logging

import numpy as np

log = logging.getLogger("jasr.train")


def zeros(shape):
    """A batch of padding rows of a bucket (B, S, L)."""
    rows, samples, tokens = shape
    return {
        "audio": np.zeros((rows, samples), np.float32),
        "audio_len": np.zeros(rows, np.int32),
        "tokens": np.zeros((rows, tokens), np.int32),
        "token_len": np.zeros(rows, np.int32),
        "index": np.full(rows, -1, np.int64),
    }


def shape_of(batch):
    """The bucket (B, S, L) of a batch; B counts the rows of all processes."""
    import jax

    rows, samples = batch["audio"].shape
    return rows * jax.process_count(), samples, batch["tokens"].shape[1]


def compile_step(shape, fn, state, mesh, label):
    """The program of `fn(state, batch)` for a bucket, with its working memory in the log."""
    import jax

    from jasr import sharding

    mine = zeros((shape[0] // jax.process_count(), *shape[1:]))
    program = fn.lower(state, sharding.put_batch(mine, mesh)).compile()
    memory = program.memory_analysis()
    if memory is not None:
        size = memory.temp_size_in_bytes / 2**20
        log.info("%s, %d tokens: %.0f MiB working memory a device", label, shape[2], size)
    return program


def summed(window):
    """Host sums over the steps of a log interval; loss and grad_norm as means."""
    import jax

    host = jax.device_get(window)
    sums = {k: float(sum(float(m[k]) for m in host)) for k in host[0]}
    good = [m for m in host if not m["bad"] and m["weight"] > 0]
    for k in ("loss", "grad_norm"):
        sums[k] = float(np.mean([m[k] for m in good])) if good else float("nan")
    sums["skipped"] = int(sums["bad"])
    sums["bad_in_row"] = max(int(m["bad_in_row"]) for m in host)
    return sums


def metrics_line(sums, lr, epoch, elapsed, waited, compile_seconds):
    """One interval's line: loss, rates, what was left out, and where the time went."""
    line = {
        "loss": sums["loss"],
        "grad_norm": sums["grad_norm"],
        "lr": float(lr),
        "epoch": epoch,
        "audio_s_per_s": sums["audio_seconds"] / elapsed,
        "input_bound": waited / elapsed,
    }
    if "updates" in sums:
        line["updates_per_utt"] = sums["updates"] / max(sums["utterances"], 1.0)
    for name in ("infeasible", "skipped"):
        if sums[name]:
            line[name] = int(sums[name])
    if compile_seconds:
        line["compile_s"] = compile_seconds
    return line


def check_same(config, tokenizer, train_data, valid_data):
    """Raises ValueError if the processes have different configs or see different data."""
    from jasr import sharding

    paths = {"train", "valid"}  # they may differ between hosts
    facts = {
        "config but for paths": json.dumps(
            config | {"data": {k: v for k, v in config["data"].items() if k not in paths}},
            sort_keys=True,
        ),
        "tokenizer": json.dumps(tokenizer.to_dict(), sort_keys=True),
        "training data (its index or batch plan)": train_data.fingerprint,
    }
    valid = valid_data.loader.plan.fingerprint if valid_data is not None else "none"
    facts["validation data (its index or batch plan)"] = valid
    sharding.check_same(facts)


def check_failed(loader):
    """Raises DataError on every process when too many utterances, of all processes together, could
    not be decoded (config.data.max_bad_share)."""
    import jax

    counts, processes = loader.tally(), jax.process_count()
    if processes > 1:
        from jax.experimental import multihost_utils

        counts = multihost_utils.process_allgather(counts.astype(np.int32)).sum(0)
    loader.judge(*counts.tolist(), processes)


@contextlib.contextmanager
def kept_on_failure(save):
    """Calls `save` before passing on what is raised inside: steps are not lost with it.

    Where that save fails too, it is logged, and what was raised first is what is passed on. Not
    with several processes: one that fails alone would wait for the others for ever.
    """
    import jax

    try:
        yield
    except Exception:
        if jax.process_count() == 1:
            try:
                save()
            except Exception as e:
                log.error("the steps since the last save are lost, saving them failed: %s", e)
        raise


def check_finite(sums, limit, step, workdir, save):
    """Raises after too many non-finite steps in a row, with the state saved to look at."""
    if limit and sums["bad_in_row"] >= limit:
        save({}, wait=True)
        raise FloatingPointError(
            f"{sums['bad_in_row']} steps in a row up to step {step} had a loss, gradient or update "
            "that is not finite (config.optim.max_bad_steps). The parameters are those before "
            "them. To find the stage: "
            f"python -m experiments.doctor numerics --checkpoint={workdir}"
        )


def asked_to_stop(stop, meeting):
    """Whether to save and leave; several processes decide together, every few steps."""
    import jax

    if jax.process_count() == 1:
        return stop()
    if not meeting:
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(stop())).any())
