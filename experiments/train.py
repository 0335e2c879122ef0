"""Trains a model from a config file; run it again with the same workdir to go on.

    python -m experiments.train --config=configs/lact_an4.py --workdir=runs/an4 \\
        --config.data.train=an4/train.jsonl --config.data.valid=an4/valid.jsonl

Any field of the config can be changed on the command line (`--config.optim.lr=3e-4`). A run
starts, in this order: from the newest good checkpoint of its own workdir; from the run, step or
average at `config.init.path` (`--config.init=PATH` for short); from imported weights there; from
scratch.

Several processes: started under Slurm, Open MPI or with torchrun-style variables they find each
other; otherwise give --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import logging
import math
import os
import pathlib
import re
import sys
import time

from absl import app, flags
from ml_collections import config_flags

from experiments import huge_pages
from experiments.errors import in_one_line, report
from jasr.training.loop import (
    asked_to_stop,
    check_failed,
    check_finite,
    check_same,
    compile_step,
    kept_on_failure,
    metrics_line,
    shape_of,
    summed,
    zeros,
)

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: path.py or path.py:variant.")
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
    """Runs a recipe to its end (or until `stop()`); returns the last validation metrics.

    Args:
      config: ConfigDict or plain dict of a recipe.
      workdir: directory of the run.
      stop: function that is asked after every step whether to save and leave.
    """
    import jax

    from jasr import checkpoint, data, metrics, settings, sharding, tree
    from jasr.systems import loading, source
    from jasr.training import optim, start, validation
    from jasr.training import step as steps

    started, chief = time.monotonic(), jax.process_index() == 0
    plain = config if isinstance(config, dict) else json.loads(config.to_json())
    workdir = pathlib.Path(workdir)
    run = settings.build(steps.RunConfig, plain["train"], "config.train")
    opt = settings.build(optim.OptimConfig, plain["optim"], "config.optim")
    given = settings.build(start.InitConfig, plain["init"], "config.init")
    kept = settings.build(checkpoint.CheckpointConfig, plain["checkpoint"], "config.checkpoint")
    check_keys(plain)

    # --- Mesh, tokenizer, task, data
    mesh = sharding.make_mesh(settings.build(sharding.MeshConfig, plain["mesh"], "config.mesh"))
    sources = settings.build(data.DataConfig, plain["data"], "config.data")
    words = settings.build(start.TextConfig, plain["text"], "config.text")
    texts = functools.partial(data.texts, sources.train)
    tokenizer = start.make_tokenizer(words, texts, given, workdir / "checkpoints")
    task = loading.build(plain, tokenizer)
    train_data = data.open_train(
        sources,
        tokenizer.encode,
        plain["seed"],
        quarantine_path=str(workdir / "quarantine.jsonl"),
        frames_needed=task.frames_needed,
        seconds_per_frame=task.seconds_per_frame,
        process_index=jax.process_index(),
    )
    valid_data = None
    if sources.valid:
        path = str(workdir / "quarantine-valid.jsonl")
        ways = math.lcm(
            sources.batch_multiple, mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count()
        )
        bounded = validation.bounded(sources, train_data.shapes, opt.accumulate, ways)
        valid_data = data.open_eval(
            bounded, sources.valid, tokenizer.encode, path, jax.process_index()
        )
        log.info("validation: %s", valid_data.describe())
    log.info("training: %s", train_data.describe())
    check_same(plain, tokenizer, train_data, valid_data)
    sharding.check_batch_sizes([b for b, _, _ in train_data.shapes], mesh, opt.accumulate)
    if hasattr(task, "groups"):
        task = dataclasses.replace(task, groups=sharding.batch_ways(mesh))
    task.check(train_data.shapes)
    start.check_rates(sources.sample_rate, task.front_end.sample_rate)

    # --- Shapes, optimizer, shardings
    key = jax.random.key(plain["seed"])
    example = zeros(train_data.shapes[0])
    shapes = jax.eval_shape(lambda: task.init(key, example))
    paths = set(tree.flatten(shapes["params"]))
    frozen = start.frozen_paths(shapes["params"], given.freeze)
    trainable, _ = tree.split(shapes["params"], paths - frozen)
    tx, rate = optim.make(opt, trainable, run.steps, frozen)

    def init():
        return steps.init_state(task, tx, key, example, frozen.__contains__, opt.ema > 0)

    state_shapes = jax.eval_shape(init)
    by_param = sharding.param_shardings(shapes["params"], mesh, task.sharding)
    shardings = sharding.like_params(state_shapes, shapes["params"], by_param, mesh)
    save_frozen = bool(frozen) and not given.path
    log.info(
        "task %s: %d parameters, %d of them trained, on %d x %s, mesh %s",
        plain["task"], tree.count(shapes["params"]), tree.count(trainable),
        jax.device_count(), jax.devices()[0].device_kind, dict(mesh.shape),
    )  # fmt: skip

    # --- Start: own checkpoint, else given weights, else scratch
    store = checkpoint.Checkpoints(workdir / "checkpoints", **settings.to_dict(kept))
    wanted = start.to_items(start.with_shardings(state_shapes, shardings), save_frozen)
    restored = store.restore(like=wanted)
    position, origin = 0, {}
    if restored is not None:
        _, saved, meta = restored
        start.check_resume(meta, train_data.fingerprint, tokenizer, plain, allow_data_change)
        validated = bool(store.metrics(meta["step"])) or valid_data is None
        if meta["step"] >= run.steps and validated:
            log.info(
                "nothing to do: the run is complete at step %d (config.train.steps is %d)",
                meta["step"], run.steps,
            )  # fmt: skip
            store.close()
            return store.metrics(meta["step"])
        rest, origin = {}, meta["frozen_from"]
        if frozen and not save_frozen:
            origin = source.locate(origin, workdir)
            rest = start.read_frozen(origin, given, shapes, shardings, frozen)
        state, position = start.from_items(state_shapes, saved, rest), meta["position"]
        log.info("resumed from step %d, batch %d of the data", int(state.step), position)
    else:
        state = jax.jit(init, out_shardings=shardings)()
        if given.path:
            origin = source.resolve(given.path, given.item)
            start.check_source(origin, given, task, paths, plain)
            if frozen:
                origin = source.keep(origin, workdir)
            state = start.with_given(state, origin, given, shapes, shardings)
            log.info("%s from %s", origin["item"], origin["path"])
    first = step = int(state.step)

    # --- Programs: one a bucket, compiled before the first step: memory runs out now or never
    step_fn = jax.jit(
        functools.partial(steps.train_step, task, tx, opt),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    tick = time.monotonic()
    programs, predictions = {}, {}
    for shape in train_data.shapes:
        label = f"training batch of {shape[0]} x {shape[1] / sources.sample_rate:.1f} s"
        programs[shape] = compile_step(shape, step_fn, state, mesh, label)
    for shape in valid_data.shapes if valid_data is not None else ():
        label = f"validation batch of {shape[0]} x {shape[1] / sources.sample_rate:.1f} s"
        fn = jax.jit(task.predict)
        predictions[shape] = compile_step(shape, fn, validation.variables(state), mesh, label)
    sharding.meet()
    compile_seconds = time.monotonic() - tick

    # --- Reports and saves
    writer = None
    if chief:
        writer = metrics.Writer(
            str(workdir), resume_step=first if first else -1, tensorboard=run.tensorboard
        )
        (workdir / "config.json").write_text(json.dumps(plain, indent=2) + "\n")

    def validate(batches=0):
        variables = validation.variables(state)
        result = validation.evaluate(task, predictions, valid_data, mesh, variables, batches)
        check_failed(valid_data.loader)
        true, pred = result.pop("sample")
        if chief:
            text = (
                f"=== Sample Prediction at Step {step} ===\nTrue: {true}\nPred: {pred}\n"
                f"WER: {metrics.wer([true], [pred])['wer']:.2%}"
            )
            print(text, file=sys.stderr, flush=True)
            if not batches:
                writer.write(step, result)
        return result

    def save(values, wait=False):
        meta = {
            "step": step,
            "position": position,
            "epoch": train_data.epoch_of(position),
            "fingerprint": train_data.fingerprint,
            "config": plain,
            "tokenizer": tokenizer.to_dict(),
            "task": plain["task"],
            "longest_seconds": max(s for _, s, _ in train_data.shapes) / sources.sample_rate,
            "frozen_from": origin if frozen and not save_frozen else {},
        }
        store.save(step, start.to_items(state, save_frozen), meta, values, wait=wait)

    # --- The loop
    window, waited, paused, mark, results = [], 0.0, 0.0, time.monotonic(), {}
    if first >= run.steps:  # saved at its end, but its validation failed
        check_finite({"bad_in_row": int(state.bad_in_row)}, opt.max_bad_steps, step, workdir, save)
        results = validate()
    batches = train_data.iterate(position, jax.process_index(), jax.process_count())
    with kept_on_failure(lambda: step > first and save({}, wait=True)):
        for _ in metrics.progress(range(first, run.steps), label="steps"):
            tick = time.monotonic()
            epoch, batch = next(batches)
            waited += time.monotonic() - tick
            state, values = programs[shape_of(batch)](state, sharding.put_batch(batch, mesh))
            window.append(values)
            step, position = step + 1, position + 1
            logging_now = step % run.log_every == 0
            stopping = asked_to_stop(stop, logging_now or step % 10 == 0)
            ending = step == run.steps or stopping
            if logging_now or ending:
                sums = summed(window)
                elapsed = time.monotonic() - mark - paused
                lr = optim.last_rate(rate, state.opt_state)
                line = metrics_line(sums, lr, epoch, elapsed, waited, compile_seconds)
                if chief:
                    writer.write(step, line)
                check_finite(sums, opt.max_bad_steps, step, workdir, save)
                check_failed(train_data.loader)
                window, waited, paused, compile_seconds = [], 0.0, 0.0, 0.0
                mark = time.monotonic()
            tick = time.monotonic()
            due = step % run.eval_every == 0 or step == run.steps
            validating = due and valid_data is not None
            if validating:
                results = validate()
            elif valid_data is not None and run.sample_every and step % run.sample_every == 0:
                validate(batches=1)
            if due or ending or (run.save_every and step % run.save_every == 0):
                save(results if validating else {}, wait=ending)
            paused += time.monotonic() - tick  # validation and saving are not training time
            if stopping:
                break
    store.close()
    batches.close()
    if store.failures:
        raise checkpoint.CheckpointError(f"the last checkpoint was not saved: {store.error}")
    if step < run.steps:
        log.warning("asked to stop: step %d is saved; run again to go on", step)
    log.info("step %d after %.0f s", step, time.monotonic() - started)
    if chief:
        writer.close()
    return results


def log_to_stderr():
    """One plain line a message of jasr on standard error; warnings only of the libraries."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("jasr")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


KNOWN = (
    "task seed data text front_end spec_augment wave_augment model loss optim train checkpoint "
    "mesh init"
).split()


def check_keys(config):
    """Raises for a top-level key that nothing reads."""
    from jasr.settings import SettingsError

    known = [*KNOWN, "decoding"] if config.get("task") == "parakeet" else KNOWN
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1) or known
            raise SettingsError(f"config.{key} is not known; did you mean {' or '.join(near)}?")


def with_init_path(argv):
    """The arguments with --config.init=PATH written out as --config.init.path=PATH."""
    return [re.sub(r"^--?config\.init=", "--config.init.path=", a) for a in argv]


if __name__ == "__main__":
    huge_pages.use()
    flags.mark_flags_as_required(["config", "workdir"])
    sys.argv[:] = with_init_path(sys.argv)  # ml_collections looks there, too
    sys.exit(in_one_line(app.run)(main))
