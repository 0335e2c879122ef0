"""Checkpoints on disk: saved atomically with checksums, verified when read, readable anywhere.

    <run>/checkpoints/300/                 one step = one unit, named by its number
        params/ batch_stats/ opt_state/ ema/ ...   trees, in Orbax's format
        meta/metadata                      JSON: data position, config, tokenizer ...
        metrics/metrics                    JSON: what the step is ranked by
        export/model.nemo ...              the weights in other formats, where they are asked for
        tokenizer-<sha>.json               the tokenizer, where it is too large for meta
        jasr_manifest.json                 size and SHA-256 of every file above

Orbax writes the trees into `300.orbax-checkpoint-tmp`; the manifest is the last file to go in;
then the directory is renamed. A step is trusted only with its manifest, so that a process killed
at any instant leaves either a whole step or a directory that nobody reads. Old steps are renamed
to `300.jasr-deleting` before their files go. Both kinds of remains are removed at the next start.

The layout is the one of `orbax.checkpoint.CheckpointManager`, which can read it. Its own deletion
of old steps is not used: it counts damaged steps, and does not delete in one go.
"""

import contextlib
import itertools
import os
import pathlib
import re
import shutil
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from jasr import settings, sharding
from jasr.checkpoint.files import (
    MANIFEST,
    CheckpointError,
    delete,
    first_line,
    first_whole,
    link,
    load_metrics,
    ranked,
    read_meta,
    report,
    seal,
    set_apart,
    step_directories,
    sync_directory,
    write_text,
)
from jasr.checkpoint.read import read_like
from jasr.checkpoint.write import about_storage, arguments, saver_of, temporaries

EXPORTS, EXPORTED = "export", "model"  # a step's folder of exports; their name without its ending
_WRITTEN = "jasr_written."  # + process: it has written its part of a temporary directory
_PATIENCE_MS = 20 * 60 * 1000  # a process waits so long for the others' parts
_numbers = itertools.count()  # of the saves, the same on every process
_REMAINS = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|jasr-deleting|jasr-probe)")


@settings.section
class CheckpointConfig:
    """Which steps stay on disk: the newest, and the best by one metric."""

    keep_latest: int = settings.field(2, least=0)  # 0 = all
    keep_best: int = settings.field(3, least=0)
    metric: str = "val_wer"
    mode: str = settings.field("min", choices=("min", "max"))  # "min": lower is better
    verify: bool = True  # read every byte of a step before it is restored
    export: tuple = ()  # formats that each step is written in as well, inside of it: names of the
    # system's originals, ("nemo",), with options "hf:branch=ctc"; links stand in <run>/exports
    resume_step: int = 0  # go on from this step instead of the newest; later ones are set aside in
    # <run>/set_aside-<step>-<time>, and as long as that is there it has been done. 0 or -1: newest


class Checkpoints(contextlib.AbstractContextManager):
    """The steps of one run, written in the background, newest and best kept.

    One process (of the job's process 0) owns the directory: hold `rundir.lock`. With several
    processes every one calls every method, on a directory that all of them see; they agree on
    whether a save failed when the next one (or `wait`) is called.

    Attributes:
      failures: saves that failed in a row (disk full, ...); 0 after a good one.
      error: what the last failure was, "" after a good save.
    """

    def __init__(self, directory, exporter=None, **config):
        """Args:
        exporter: (directory of a step that is written, names of its trees, `export`), which puts
          the exports into `directory`/export, on process 0.
        config: fields of CheckpointConfig.
        """
        self.config, self.exporter = CheckpointConfig(**config), exporter
        self.directory = pathlib.Path(directory).absolute()
        self.failures, self.error = 0, ""
        self._damaged, self._saved = set(), set()
        self._saving = self._thread = self._saver = None
        self._number = self._met = 0
        if _primary():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_remains()
            for d in step_directories(self.directory).values():
                if not (d / MANIFEST).exists():
                    report(f"checkpoint {d} has no {MANIFEST}: half-written, it is not used")
            self._link_exports()

    def __exit__(self, *exc):
        self.close()

    def steps(self):
        """The numbers of the whole steps on disk, ascending."""
        found = step_directories(self.directory)
        return [s for s, d in found.items() if (d / MANIFEST).exists() and s not in self._damaged]

    def metrics(self, step):
        """The metrics dict that was saved with a step ({} if none)."""
        return load_metrics(self.directory / str(step))

    def save(self, step, state, meta=None, metrics=None, wait=False):
        """Whether the save was started (with `wait`: whether the step is now whole on disk).

        Returns at once; the arrays may be donated or changed afterwards. A failed save (disk
        full, ...) is reported and counted in `failures`, never raised; earlier steps stay.

        Args:
          step: int; one that this object has saved or restored is not saved again (False); a
            damaged or abandoned directory of this number is replaced.
          state: {item name: pytree of arrays}; an item without leaves takes no space.
          meta: JSON-able dict.
          metrics: {name: number}; NaN or a missing `metric` never counts as best.
          wait: return only when the step is whole on disk.
        """
        self.wait()
        if step in self._saved:
            return False
        meta, apart = set_apart(meta)
        names, args = arguments(state, meta, metrics)
        fault = self._make_way(step, apart) if _primary() else None
        if not _agree(fault is None):
            self._save_failed(step, fault or CheckpointError("process 0 cannot write there"))
            return False
        if self._saver is None:
            # The seal is set on process 0 when all processes have written, before the rename.
            self._saver = saver_of(names, self._seal_temporary, self._done)
        self._saving, self._number, self._met = (step, names), next(_numbers), 0
        self._apart = list(apart)
        try:
            self._saver.save(self.directory / str(step), args=args)
        except Exception as e:
            if not about_storage(e):
                raise
            fault = e
        self._thread = threading.Thread(
            target=self._finish, args=(step, fault), name="jasr-checkpoint"
        )
        self._thread.start()
        if wait:
            self.wait()
            return self.failures == 0
        return fault is None

    def restore(self, step=None, like=None):
        """(step, state, meta) of the newest good step, or None if there is no step at all.

        A damaged step is reported and the one before it used.

        Args:
          step: a number restores exactly that step.
          like: {item: pytree of arrays or ShapeDtypeStruct}; a leaf with `.sharding` comes back
            as a jax.Array placed so (on any mesh), one without as numpy. Items of the checkpoint
            that are not in `like` are not read. Or a function of the step's meta that gives it.

        Raises:
          CheckpointError: no step is good (names each with its fault); the wanted step is not
            good; or the step does not fit `like` (lists missing, unexpected and different leaves).
        """
        self.wait()
        if step is None and not _agree(len(step_directories(self.directory))):
            return None
        if step is None and self.config.resume_step > 0 and _agree(self._set_aside()):
            step = self.config.resume_step
        chosen, faults = -1, []
        if _primary():
            numbers = [step] if step is not None else step_directories(self.directory)
            candidates = [self.directory / str(n) for n in sorted(numbers, reverse=True)]
            whole, faults = first_whole(candidates, checksums=self.config.verify)
            self._damaged |= {int(d.name) for d in candidates[: len(faults)]}
            chosen = int(whole.name) if whole else -1
        chosen = _agree(chosen)
        if chosen < 0:
            raise CheckpointError(
                f"no usable checkpoint in {self.directory}:\n  " + "\n  ".join(faults)
            )
        directory = self.directory / str(chosen)
        meta = read_meta(directory)
        state = read_like(directory, like(meta) if callable(like) else like or {})
        self._saved.add(chosen)
        return chosen, state, meta

    def wait(self):
        """Returns when no save is under way; every process then knows whether it failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, step = None, self._saving[0]
        if _agree(self.failures == 0):  # process 0 has committed it or has not
            self.failures, self.error = 0, ""
            self._saved.add(step)
        elif not self.failures:
            self._save_failed(step, CheckpointError("process 0 did not commit it, see its log"))

    def close(self):
        """Waits for the save under way and releases Orbax's threads."""
        self.wait()
        if self._saver is not None:
            self._saver.close()
            self._saver = None

    def _set_aside(self):
        """Whether `resume_step` is the step to restore, after later ones were put aside; on process
        0. Not where that was done before, so that what has been trained since goes on."""
        if not _primary():
            return False
        root, wanted = self.directory.parent, self.config.resume_step
        if any(root.glob(f"set_aside-{wanted}-*")):
            return False
        found = step_directories(self.directory)
        if wanted in found:
            aside = root / f"set_aside-{wanted}-{time.strftime('%Y%m%d-%H%M%S')}"
            aside.mkdir()
            for number, directory in found.items():
                if number > wanted:
                    directory.rename(aside / directory.name)
            self._link_exports()
        return True

    def _link_exports(self):
        """Makes <run>/exports/step_000300.nemo a relative link to what step 300 holds."""
        folder = self.directory.parent / "exports"
        found = {}
        for step, directory in step_directories(self.directory).items():
            inside = directory / EXPORTS
            for path in inside.iterdir() if inside.is_dir() else ():
                ending = path.name.removeprefix(EXPORTED)
                found[f"step_{step:06d}{ending}"] = os.path.relpath(path, folder)
        with contextlib.suppress(OSError):  # a file system without links; the steps hold the files
            for old in folder.iterdir() if folder.is_dir() else ():
                if old.is_symlink() and found.get(old.name) != os.readlink(old):
                    old.unlink()
            for name, target in found.items():
                folder.mkdir(exist_ok=True)
                if not (folder / name).is_symlink():
                    (folder / name).symlink_to(target)

    def _make_way(self, step, apart):
        """Removes what is left of a step and writes the files that stand once beside all steps;
        what stands against a new directory, None if nothing."""
        try:
            for name, text in apart.items():
                if not (self.directory.parent / name).exists():
                    write_text(self.directory.parent / name, text)
            delete(self.directory / str(step))
            probe = self.directory / f"{step}.jasr-probe"
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        except OSError as e:
            return e
        return None

    def _done(self, *, key, timeout_ms):
        """Orbax calls it when this process has written its part, and when process 0 is done."""
        if self._met == 0 and not _primary():
            (temporary,) = temporaries(self.directory / str(self._saving[0]))
            (temporary / f"{_WRITTEN}{jax.process_index()}").touch()
        self._meet()

    def _meet(self):
        """Waits for the other processes: first when all have tried to write, then at the end."""
        self._met += 1
        barrier = ocp.multihost.get_barrier_sync_fn()
        barrier(key=f"jasr checkpoint {self._number}.{self._met}", timeout_ms=_PATIENCE_MS)

    def _seal_temporary(self):
        step, items = self._saving
        (temporary,) = temporaries(self.directory / str(step))
        for process in range(1, jax.process_count()):
            mark = temporary / f"{_WRITTEN}{process}"
            if not mark.exists():
                raise CheckpointError(f"process {process} did not write its part, see its log")
            mark.unlink()
        for name in self._apart:
            link(self.directory.parent / name, temporary / name)
        if self.config.export:
            self.exporter(temporary, items, self.config.export)
        seal(temporary, step=step, items=items, metric=self.config.metric, mode=self.config.mode)

    def _finish(self, step, fault):
        """Runs in a thread: waits for the commit, then lets old steps go."""
        try:
            if fault is not None:
                raise fault
            self._saver.wait_until_finished()
            sync_directory(self.directory)
        except BaseException as e:
            with contextlib.suppress(Exception):  # the others must not wait for this process
                while self._met < 2:
                    self._meet()
            self._save_failed(step, e)
            return
        self.failures, self.error = 0, ""
        self._saved.add(step)
        self._damaged.discard(step)
        if _primary():
            try:
                self._retire(step)
                self._link_exports()
            except OSError as e:
                report(f"old checkpoints in {self.directory} could not be deleted: {e}")

    def _retire(self, newest):
        steps = self.steps()
        config = self.config
        best = ranked(self.directory, steps, config.metric, config.mode)[: config.keep_best]
        keep = {newest, *best, *steps[-config.keep_latest :]}  # all, if it is 0
        for step in steps:
            if step not in keep:
                delete(self.directory / str(step))

    def _save_failed(self, step, error):
        self.failures += 1
        self._saved.discard(step)
        self.error = f"step {step}: {first_line(error)}"
        with contextlib.suppress(Exception):  # it may raise what it has failed with, again
            self._saver.close()
        self._saver = None
        if _primary():
            self._remove_remains()
        kept = self.steps()
        report(
            f"checkpoint of step {step} in {self.directory} could NOT be saved: "
            f"{first_line(error)}. The run goes on; the last good step is "
            f"{kept[-1] if kept else 'none'}."
        )

    def _remove_remains(self):
        for d in self.directory.iterdir():
            if d.is_dir() and _REMAINS.fullmatch(d.name):
                shutil.rmtree(d, ignore_errors=True)


def _primary():
    return jax.process_index() == 0


def _agree(number):
    """Process 0's number, on every process."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    sharding.meet()  # checksums may take process 0 minutes, and a collective is not made to wait
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
