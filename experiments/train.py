"""Trains a model from a config file; run it again with the same workdir to go on.

    python -m experiments.train --config=configs/lact_an4.py --workdir=runs/an4 \\
        --config.data.train=an4/train.jsonl --config.data.valid=an4/valid.jsonl

Any field of the config can be changed on the command line (`--config.optim.lr=3e-4`). A recipe may
also be NeMo's speech_to_text_finetune.yaml (docs/nemo_recipe.md). A run
starts, in this order: from the newest good checkpoint of its own workdir; from the run, step or
average at `config.init.path` (`--config.init=PATH` for short); from imported weights there; from
scratch.

Several processes: started under Slurm, Open MPI or with torchrun-style variables they find each
other; otherwise give --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import contextlib
import logging
import os
import pathlib
import re
import sys
import time

from absl import app, flags
from ml_collections import config_flags

from experiments import huge_pages
from experiments.errors import in_one_line, report

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe: path.py[:variant] or NeMo's .yaml."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, log.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
PROCESSES = flags.DEFINE_integer("num_processes", 0, "Number of processes of the run.")
PROCESS = flags.DEFINE_integer("process_id", -1, "This process, from 0.")
CHANGED = flags.DEFINE_bool("allow_data_change", False, "Resume although the data changed.")

log = logging.getLogger("jasr.train")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    log_to_stderr()
    from jasr import compilation_cache, sharding
    from jasr.training import rundir

    several = sharding.init_distributed(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    compilation_cache.enable()
    import jax

    workdir = pathlib.Path(WORKDIR.value)
    alone = rundir.lock(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    try:
        with alone, rundir.StopFlag() as stop:
            train(CONFIG.value, workdir, stop, CHANGED.value)
    except Exception as e:
        if several:  # an ordered exit would wait for the others, which wait for this process
            report(e)
            if jax.process_index() == 0:
                time.sleep(3)  # the coordinator ends with it, and what it ends cannot speak
            os._exit(1)
        raise


def train(config, workdir, stop=lambda: False, allow_data_change=False):
    """Runs a recipe to its end; see `jasr.training.loop.train`."""
    from jasr.training import loop

    return loop.train(config, workdir, stop, allow_data_change)


def log_to_stderr():
    """One plain line a message of jasr on standard error; warnings only of the libraries."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("jasr")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def written_out(argv):
    """The arguments with --config.init=PATH as --config.init.path=PATH, and another toolkit's
    --config=RECIPE.yaml as the argument of configs/foreign.py."""
    foreign = pathlib.Path(__file__).parent.parent / "configs" / "foreign.py"
    found = [re.sub(r"^--?config\.init=", "--config.init.path=", a) for a in argv]
    for n, before in enumerate(["", *found[:-1]]):
        flag = r"^" if before in ("--config", "-config") else r"^--?config="
        found[n] = re.sub(rf"({flag})(.+\.ya?ml)$", rf"\g<1>{foreign}:\2", found[n])
    return found


if __name__ == "__main__":
    huge_pages.use()
    flags.mark_flags_as_required(["config", "workdir"])
    sys.argv[:] = written_out(sys.argv)  # ml_collections looks there, too
    sys.exit(in_one_line(app.run)(main))
