"""The training loop of every task: from a config to checkpoints, metrics and the last validation.

    results = train(config, "runs/an4")

The loop knows a task by what `jasr.seam.Task` says and a batch by its key "index" alone.
"""

import dataclasses
import difflib
import functools
import json
import logging
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jasr import checkpoint, data, metrics, settings, sharding, tree
from jasr.systems import catalogue, loading, source
from jasr.training import guards, optim, start, validation
from jasr.training import step as steps

log = logging.getLogger("jasr.train")

GENERAL = "task seed data text optim train checkpoint mesh init".split()  # sections of every config


def train(config, workdir, stop=lambda: False, allow_data_change=False):
    """Runs a recipe to its end (or until `stop()`); returns the last validation metrics.

    Args:
      config: ConfigDict or plain dict of a recipe; what is left out has its default.
      workdir: directory of the run.
      stop: function that is asked after every step whether to save and leave.
      allow_data_change: resume although the data or its batching changed.
    """
    started = time.monotonic()
    run = prepare(complete(settings.plain(config)), pathlib.Path(workdir))
    state, position, done = begin(run, allow_data_change)
    if done is not None:
        return done
    results = Loop(run, state, position).run(stop)
    log.info("finished after %.0f s", time.monotonic() - started)
    return results


@dataclasses.dataclass
class Run:
    """What a run is made of before its state: settings, data, task, shapes and where things lie."""

    config: dict
    workdir: pathlib.Path
    rhythm: steps.RunConfig
    optim: optim.OptimConfig
    given: start.InitConfig
    mesh: Any
    task: Any
    train_data: Any
    valid_data: dict  # {name of the set: data}
    validators: dict
    store: Any
    shapes: Any = None  # of the task's variables
    frozen: frozenset = frozenset()
    tx: Any = None
    rate: Callable | None = None
    state_shapes: Any = None  # with their shardings
    origins: list = dataclasses.field(default_factory=list)  # of frozen weights
    written: frozenset = frozenset()  # frozen parameters that no origin holds


def prepare(plain, workdir):
    """The Run of a plain config: everything is checked, nothing is drawn or compiled."""
    check_keys(plain)

    def section(cls, name):
        return settings.build(cls, plain[name], f"config.{name}")

    rhythm, opt = section(steps.RunConfig, "train"), section(optim.OptimConfig, "optim")
    given, kept = (
        start.init_config(plain["init"]),
        section(checkpoint.CheckpointConfig, "checkpoint"),
    )
    mesh = sharding.make_mesh(section(sharding.MeshConfig, "mesh"))
    sources, words = section(data.DataConfig, "data"), section(start.TextConfig, "text")
    texts = functools.partial(data.texts, sources.train)
    tokenizer = start.make_tokenizer(words, texts, given, workdir / "checkpoints")
    task = loading.build(plain, tokenizer, sharding.batch_ways(mesh))
    train_data = data.open_train(
        sources,
        task.layout,
        plain["seed"],
        quarantine_path=str(workdir / "quarantine.jsonl"),
        process_index=jax.process_index(),
        version=start.plan_version(workdir / "checkpoints"),
    )
    valid_data = open_valid(sources, train_data.shapes, opt, mesh, task.layout, workdir)
    log.info("training: %s", train_data.describe())
    guards.check_same(plain, task.tokenizer, train_data, valid_data)
    sharding.check_batch_sizes([bucket[0] for bucket in train_data.shapes], mesh, opt.accumulate)
    task.check(train_data.shapes)
    if rhythm.epochs:
        whole = max(1, train_data.batches_in(rhythm.epochs))
        rhythm = dataclasses.replace(rhythm, steps=whole)
        log.info("%g epochs are %d steps", rhythm.epochs, whole)
    validators = validation.chosen(task, rhythm.validate)
    check_metric(kept, validation.metric_names(validators, valid_data), bool(valid_data))
    for name in kept.export:
        source.parse_export(plain["task"], name)
    exporter = source.exports(plain["task"])
    store = checkpoint.Checkpoints(workdir / "checkpoints", exporter, **settings.to_dict(kept))
    run = Run(
        plain, workdir, rhythm, opt, given, mesh, task, train_data, valid_data, validators, store
    )
    shape(run)
    return run


def open_valid(sources, shapes, opt, mesh, layout, workdir):
    """{name: data} of the validation sets, all with the same buckets; {} without one."""
    ways = math.lcm(sources.batch_multiple, sharding.batch_ways(mesh), jax.process_count())
    bounded = validation.bounded(sources, layout, shapes, opt.accumulate, ways)
    sets = validation.sets_of(sources.valid)
    paths = {
        name: str(workdir / f"quarantine-valid{f'-{name}' if name else ''}.jsonl") for name in sets
    }
    found = data.open_evals(bounded, sets, layout, paths, jax.process_index())
    for name, valid in found.items():
        log.info("validation%s: %s", f" {name}" if name else "", valid.describe())
    return found


def check_metric(kept, names, validates):
    """Says that no best step is kept without a validation set; refuses a metric that none gives.

    Raises:
      ValueError: config.checkpoint.metric is no metric of the validation sets.
    """
    if not validates:
        log.info("no validation set: no best step is kept, only the newest ones")
    elif kept.keep_best and kept.metric not in names:
        raise ValueError(
            f"config.checkpoint.metric {kept.metric!r}: validation gives {', '.join(names)}"
        )


def shape(run):
    """Adds shapes, optimizer and shardings to a Run."""
    task, opt = run.task, run.optim
    key, example = jax.random.key(run.config["seed"]), task.layout.empty(run.train_data.shapes[0])
    run.shapes = jax.eval_shape(lambda: task.init(key, example))
    paths = set(tree.flatten(run.shapes["params"]))
    run.frozen = frozenset(start.frozen_paths(run.shapes["params"], run.given.freeze))
    trainable, _ = tree.split(run.shapes["params"], paths - run.frozen)
    run.tx, run.rate = optim.make(opt, trainable, run.rhythm.steps, run.frozen)
    state = jax.eval_shape(lambda: fresh(run))
    by_param = sharding.param_shardings(run.shapes["params"], run.mesh, task.sharding)
    run.state_shapes = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        sharding.like_params(state, run.shapes["params"], by_param, run.mesh),
    )
    log.info(
        "task %s: %d parameters, %d of them trained, on %d x %s, mesh %s",
        run.config["task"], tree.count(run.shapes["params"]), tree.count(trainable),
        jax.device_count(), jax.devices()[0].device_kind, dict(run.mesh.shape),
    )  # fmt: skip


def fresh(run):
    """A TrainState drawn from the seed; to be jitted or shaped."""
    example = run.task.layout.empty(run.train_data.shapes[0])
    key = jax.random.key(run.config["seed"])
    return steps.init_state(
        run.task, run.tx, key, example, run.frozen.__contains__, run.optim.ema > 0
    )


def begin(run, allow_data_change=False):
    """(state, position in the data, None) to train from: the run's own checkpoint, else given
    weights, else scratch. Of a complete run (None, 0, its metrics)."""
    shapes, given = run.shapes, run.given
    restored = run.store.restore(
        like=lambda meta: start.to_items(run.state_shapes, start.written_of(run.frozen, meta))
    )
    if restored is None:
        origins = start.origins(given, run.config) if given.path else []
        for origin in origins:
            start.check_source(origin, given, run.task, tree.flatten(shapes["params"]), run.config)
        leaves = start.given_leaves(origins, given, shapes)
        origins, leaves = start.keep(origins, leaves, run.frozen, run.workdir)
        run.origins = [origin for origin in origins if "leaves" in origin]
        run.written = start.written_of(run.frozen, {"frozen_from": run.origins})
        known = {path: leaf for found in leaves for path, leaf in found.items()}
        state = start.state_from(functools.partial(fresh, run), run.state_shapes, known)
        for origin in origins:
            log.info("%s from %s", origin["item"], origin["path"])
        return state, 0, None
    _, saved, meta = restored
    start.check_resume(meta, run.train_data, run.task.tokenizer, run.config, allow_data_change)
    found = run.store.metrics(meta["step"])
    if meta["step"] >= run.rhythm.steps and (found or not run.valid_data):
        log.info(
            "nothing to do: the run is complete at step %d (config.train.steps is %d)",
            meta["step"], run.rhythm.steps,
        )  # fmt: skip
        run.store.close()
        return None, 0, found
    run.written = start.written_of(run.frozen, meta)
    rest, run.origins = start.read_frozen(meta, run.state_shapes.frozen, run.workdir)
    state = start.from_items(run.state_shapes, saved, rest)
    log.info("resumed from step %d, batch %d of the data", int(state.step), meta["position"])
    return state, meta["position"], None


def compiled(run, state):
    """({bucket: training program}, {set: {bucket: validation program}}).

    One program a bucket, all before the first step: memory runs out now or never.
    """
    step_fn = jax.jit(
        functools.partial(steps.train_step, run.task, run.tx, run.optim),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, run.state_shapes), None),
    )
    programs, measured, known = {}, {}, {}
    for number, bucket in enumerate(run.train_data.shapes):
        programs[number] = compile_step(run, bucket, step_fn, "training", state)
    measure = jax.jit(validation.program(run.validators))
    variables, key = validation.variables(state), jax.random.key(run.config["seed"])
    for name, valid in run.valid_data.items():
        for bucket in valid.shapes:
            if bucket not in known:
                known[bucket] = compile_step(run, bucket, measure, "validation", variables, key)
        measured[name] = {number: known[bucket] for number, bucket in enumerate(valid.shapes)}
    sharding.meet()
    return programs, measured


def compile_step(run, bucket, fn, what, first, *rest):
    """The program of `fn(first, batch, *rest)` for a bucket, with its working memory in the log."""
    mine = run.task.layout.empty((bucket[0] // jax.process_count(), *bucket[1:]))
    program = fn.lower(first, sharding.put_batch(mine, run.mesh), *rest).compile()
    memory = program.memory_analysis()
    if memory is not None:
        size = memory.temp_size_in_bytes / 2**20
        label = run.task.layout.label(bucket)
        log.info("%s batch of %s: %.0f MiB working memory a device", what, label, size)
    return program


class Loop:
    """The steps of a run with its reports and saves."""

    def __init__(self, run, state, position):
        tick = time.monotonic()
        self.made, self.state, self.position = run, state, position
        self.programs, self.measured = compiled(run, state)
        self.compile_seconds = time.monotonic() - tick
        self.first = self.step = int(state.step)
        self.writer = None
        if jax.process_index() == 0:
            self.writer = metrics.Writer(
                str(run.workdir),
                resume_step=self.first if self.first else -1,
                tensorboard=run.rhythm.tensorboard,
            )
            text = json.dumps(run.config, indent=2) + "\n"
            (run.workdir / "config.json").write_text(text)
        self.window, self.waited, self.paused, self.mark = [], 0.0, 0.0, time.monotonic()

    def run(self, stop):
        """Trains until config.train.steps or `stop()`; the last validation's metrics."""
        run, rhythm, results = self.made, self.made.rhythm, {}
        if self.first >= rhythm.steps:  # saved at its end, but its validation failed
            self.check_finite({"bad_in_row": int(self.state.bad_in_row)})
            results = self.validate()
        batches = run.train_data.iterate(self.position, jax.process_index(), jax.process_count())
        with guards.kept_on_failure(lambda: self.step > self.first and self.save({}, wait=True)):
            for _ in metrics.progress(range(self.first, rhythm.steps), label="steps"):
                epoch = self.one_step(batches)
                logging_now = self.step % rhythm.log_every == 0
                stopping = guards.asked_to_stop(stop, logging_now or self.step % 10 == 0)
                ending = self.step == rhythm.steps or stopping
                if logging_now or ending:
                    self.report(epoch)
                tick = time.monotonic()
                due = self.step % rhythm.eval_every == 0 or self.step == rhythm.steps
                validating = due and bool(run.valid_data)
                if validating:
                    results = self.validate()
                elif run.valid_data and rhythm.sample_every:
                    if self.step % rhythm.sample_every == 0:
                        self.validate(batches=1)
                if due or ending or (rhythm.save_every and self.step % rhythm.save_every == 0):
                    self.save(results if validating else {}, wait=ending)
                self.paused += time.monotonic() - tick  # this is not training time
                if stopping:
                    break
        run.store.close()
        batches.close()
        if run.store.failures:
            raise checkpoint.CheckpointError(
                f"the last checkpoint was not saved: {run.store.error}"
            )
        if self.step < rhythm.steps:
            log.warning("asked to stop: step %d is saved; run again to go on", self.step)
        if self.writer:
            self.writer.close()
        return results

    def one_step(self, batches):
        """Trains on the next batch; its epoch."""
        tick = time.monotonic()
        epoch, bucket, batch = next(batches)
        self.waited += time.monotonic() - tick
        batch = sharding.put_batch(batch, self.made.mesh)
        self.state, values = self.programs[bucket](self.state, batch)
        self.window.append(values)
        self.step, self.position = self.step + 1, self.position + 1
        return epoch

    def report(self, epoch):
        """Writes the line of an interval and checks what happened in it."""
        sums = summed(self.window)
        elapsed = time.monotonic() - self.mark - self.paused
        line = {
            "loss": sums["loss"],
            "grad_norm": sums["grad_norm"],
            "lr": float(optim.last_rate(self.made.rate, self.state.opt_state)),
            "epoch": epoch,
            **self.made.task.line(sums, elapsed),
            "input_bound": self.waited / elapsed,
        }
        if sums["bad"]:
            line["skipped"] = int(sums["bad"])
        if self.compile_seconds:
            line["compile_s"] = self.compile_seconds
        if self.writer:
            self.writer.write(self.step, line)
        self.check_finite(sums)
        guards.check_failed(self.made.train_data)
        self.window, self.waited, self.paused, self.compile_seconds = [], 0.0, 0.0, 0.0
        self.mark = time.monotonic()

    def validate(self, batches=0):
        """The metrics of the validation sets, written unless only some batches were looked at."""
        run = self.made
        key = jax.random.fold_in(jax.random.key(run.config["seed"]), self.step)
        result, lines = validation.validate(
            run.validators, self.measured, run.valid_data, run.mesh,
            validation.variables(self.state), key, batches,
        )  # fmt: skip
        for valid in run.valid_data.values():
            guards.check_failed(valid)
        if self.writer:
            head = f"=== Sample Prediction at Step {self.step} ==="
            print("\n".join([head, *lines]), file=sys.stderr, flush=True)
            if not batches:
                self.writer.write(self.step, result)
        return result

    def save(self, values, wait=False):
        """Starts to save the state with these metrics."""
        run = self.made
        meta = {
            "step": self.step,
            "position": self.position,
            "epoch": run.train_data.epoch_of(self.position),
            "plan": run.train_data.facts(),
            "config": run.config,
            "tokenizer": run.task.tokenizer.to_dict(),
            "task": run.config["task"],
            "longest": run.train_data.longest(),
            "frozen_from": start.frozen_from(run.origins),
        }
        run.store.save(self.step, start.to_items(self.state, run.written), meta, values, wait=wait)

    def check_finite(self, sums):
        limit, run = self.made.optim.max_bad_steps, self.made
        guards.check_finite(sums, limit, self.step, run.workdir, self.save)


def summed(window):
    """Host sums over the steps of a log interval; loss and grad_norm as means."""
    host = jax.device_get(window)
    sums = {k: float(sum(float(m[k]) for m in host)) for k in host[0]}
    good = [m for m in host if not m["bad"] and m["usable"]]
    for k in ("loss", "grad_norm"):
        sums[k] = float(np.mean([m[k] for m in good])) if good else float("nan")
    sums["bad_in_row"] = max(int(m["bad_in_row"]) for m in host)
    return sums


def complete(config):
    """A plain config with an empty mapping for each section that it leaves out."""
    names = [*GENERAL, *catalogue.sections(catalogue.get(config["task"]))]
    return {**dict.fromkeys(names, {}), "seed": 0, **config}


def check_keys(config):
    """Raises for a top-level key that nothing reads."""
    known = [*GENERAL, *catalogue.get(config["task"]).sections]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1) or known
            raise settings.SettingsError(
                f"config.{key} is not known; did you mean {' or '.join(near)}?"
            )
