"""What all processes of a run check together, and what is kept when one fails."""

import contextlib
import json
import logging

import jax
import numpy as np
from jax.experimental import multihost_utils

from jasr import sharding

log = logging.getLogger("jasr.train")


def check_same(config, tokenizer, train_data, valid_data):
    """Raises ValueError if the processes have different configs or see different data."""
    paths = {"train", "valid"}  # they may differ between hosts
    facts = {
        "config but for paths": json.dumps(
            config | {"data": {k: v for k, v in config["data"].items() if k not in paths}},
            sort_keys=True,
        ),
        "tokenizer": json.dumps(tokenizer.to_dict(), sort_keys=True),
        "training data (its index or batch plan)": json.dumps(train_data.facts()),
    }
    valid = [json.dumps(valid_data[name].facts()) for name in sorted(valid_data)]
    facts["validation data (its index or batch plan)"] = " ".join(valid) or "none"
    sharding.check_same(facts)


def check_failed(loader):
    """Raises DataError on every process when too many utterances, of all processes together, could
    not be decoded (config.data.max_bad_share)."""
    counts = loader.tally().astype(np.int32)[None]
    counts = multihost_utils.process_allgather(counts, tiled=True).sum(0)
    loader.judge(*counts.tolist(), jax.process_count())


@contextlib.contextmanager
def kept_on_failure(save):
    """Calls `save` before passing on what is raised inside: steps are not lost with it.

    Where that save fails too, it is logged, and what was raised first is what is passed on. Not
    with several processes: one that fails alone would wait for the others for ever.
    """
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
    if jax.process_count() == 1:
        return stop()
    return meeting and bool(multihost_utils.process_allgather(np.asarray(stop())).any())
