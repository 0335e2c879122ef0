"""Kills a tiny run over and over; it must come out as if nobody had.

    python -m experiments.bench.resume [--kills=30 --steps=40 --seed=0 --dir=DIR]

One run goes through undisturbed. Then runs of the same recipe are killed (SIGKILL), in turn at a
random time and at a named instant of a save, and started again until they finish. Each must end
with the same bits in parameters, statistics, optimizer state, moving average and key, and must have
seen the same audio of the same utterances at every position. The exit status is 0 only then.

Every start is a fork of a process that has imported everything and run nothing, so that it costs
what the run itself costs.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
import traceback

INSTANTS = ("items written", "manifest not renamed", "sealed", "committed", "old step half deleted")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=40, help="length of a run")
    parser.add_argument("--save_every", type=int, default=2)
    parser.add_argument("--instants_only", action="store_true", help="no kills at random times")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--manifest", default=str(ROOT / "tests" / "data" / "train.jsonl"))
    parser.add_argument("--dir", default="", help="where the runs go (a temporary directory)")
    args = parser.parse_args(argv)
    load_modules()
    config = tiny_config(args.manifest, args.steps, args.save_every)
    with tempfile.TemporaryDirectory(dir=args.dir or None) as folder:
        folder = pathlib.Path(folder)
        if not args.instants_only:  # else the undisturbed run would be timed with its compilation
            start(config, folder / "warm-up")
        ended, seconds = start(config, folder / "undisturbed")
        if ended != "done":
            print((folder / "undisturbed" / "log.txt").read_text()[-3000:], file=sys.stderr)
            print(f"the undisturbed run: {ended}", file=sys.stderr)
            return 1
        want = outcome(folder / "undisturbed")
        print(f"undisturbed: {seconds:.1f} s from its first batch")
        return torture(args, config, folder, want, seconds)


def torture(args, config, folder, want, seconds):
    """Kills runs until there were enough kills; 0 if every run ended as `want` says."""
    rng = random.Random(args.seed)
    counts, bad, runs, kills, unfinished = collections.Counter(), 0, 0, 0, False
    while kills < args.kills or unfinished:
        workdir = folder / f"run-{runs}"
        delay, instant = 0.0, ""
        if kills < args.kills and (args.instants_only or kills % 2):
            instant = INSTANTS[(kills if args.instants_only else kills // 2) % len(INSTANTS)]
        elif kills < args.kills:
            delay = rng.uniform(0, seconds)
        status, took = start(config, workdir, delay, instant)
        unfinished = status == "killed"
        if unfinished:
            kills += 1
            counts[instant or "random time"] += 1
            there = list((workdir / "checkpoints").glob("*"))
            torn = [p.name for p in there if p.suffix]
            counts["left a half-written or half-deleted step"] += bool(torn)
            steps = sorted(int(p.name) for p in there if not p.suffix)
            how = instant or f"after {delay:.2f} s"
            print(
                f"kill {kills:>2}: {how:<24} run {runs}, steps {steps}, remains {torn}", flush=True
            )
            continue
        if status != "done":
            print((workdir / "log.txt").read_text()[-3000:])
            raise SystemExit(f"run {runs} failed by itself: {status}")
        seconds = min(seconds, took)  # the random times fit the speed of the machine now
        got = outcome(workdir)
        wrong = [name for name in want | got if want.get(name) != got.get(name)]
        bad += bool(wrong)
        said = f"{', '.join(wrong)} differ" if wrong else "identical"
        print(f"run {runs} finished: {said}", flush=True)
        runs += 1
    print(f"{kills} kills in {runs} runs: " + ", ".join(f"{k} {v}" for k, v in counts.items()))
    print(f"{runs - bad} of {runs} runs identical to the undisturbed one")
    return 1 if bad else 0


def tiny_config(manifest, steps, save_every):
    """A recipe of a few thousand parameters with every source of randomness in it."""
    from configs import common

    config = common.default()
    config.data.update(
        train=(manifest,), num_buckets=1, bucket_batch_size=(4,), speeds=(0.9, 1.0, 1.1)
    )
    config.wave_augment.update(gain_db=6.0, noise_share=0.5)
    config.spec_augment.update(freq_masks=1, time_masks=1)
    config.model.update(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attn_heads=2,
        num_lact_heads=2, audio_encoder_layers=2, subsampling=4, conv_kernel=3, dropout=0.1,
        lact_mode="bidirectional", use_muon=False, use_momentum=False, positions="none",
        window_size=0,
    )  # fmt: skip
    config.optim.update(lr=1e-3, warmup_steps=4, ema=0.9)
    config.train.update(steps=steps, log_every=10, eval_every=10_000, save_every=save_every)
    config.checkpoint.update(keep_latest=2, keep_best=1)
    return json.loads(config.to_json())


def load_modules():
    """Imports what a run needs, so that its forks have it; nothing may start a device or thread."""
    import soundfile  # noqa: F401

    import experiments.train  # noqa: F401
    from jasr.data import batches  # noqa: F401
    from jasr.systems.lact import task  # noqa: F401
    from jasr.training import loop  # noqa: F401


def fork(work):
    """The number of a new process that does work(); its exit status is 0 if that went well."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def start(config, workdir, delay=0.0, instant=""):
    """("done" | "killed" | what went wrong, seconds since its first batch) of one start of a run.

    Args:
      delay: kill it so many seconds after its first batch.
      instant: kill it at this instant of its first save (of its first deletion).
    """
    workdir.mkdir(exist_ok=True)
    read, write = os.pipe()
    pid = fork(lambda: child(config, workdir, instant, write))
    os.close(write)
    begun = bool(os.read(read, 1))  # empty when the child is gone
    tick = time.monotonic()
    if begun and delay:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(read)
    code = os.waitstatus_to_exitcode(status)
    named = {0: "done", -signal.SIGKILL: "killed"}.get(code, f"exit status {code}")
    return named, time.monotonic() - tick


def child(config, workdir, instant, pipe):
    """The run itself: notes every batch that it takes, and dies at the wanted instant."""
    log = os.open(workdir / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from experiments import train
    from jasr import compilation_cache
    from jasr.data import batches
    from jasr.training import rundir

    compilation_cache.enable()
    plain = batches.Train.iterate
    seen = open(workdir / "seen.jsonl", "a", buffering=1)

    def iterate(self, start, *rest):
        stream = plain(self, start, *rest)
        try:
            for position, (epoch, bucket, batch) in enumerate(stream, start):
                audio = hashlib.sha256(batch["audio"].tobytes()).hexdigest()
                rows = batch["index"].tolist()
                seen.write(json.dumps([position, epoch, rows, audio]) + "\n")
                if position == start:
                    os.write(pipe, b"1")
                yield epoch, bucket, batch
        finally:
            stream.close()

    batches.Train.iterate = iterate
    if instant:
        arm(workdir / "checkpoints", instant)
    with rundir.lock(workdir):
        train.train(config, workdir)


def arm(directory, instant):
    """Makes this process kill itself at an instant of a save."""
    from jasr.checkpoint import files, steps

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def around(owner, name, before=lambda *_: False, after=False):
        plain = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if before(*args):
                die()
            result = plain(*args, **kwargs)
            if after:
                die()
            return result

        setattr(owner, name, wrapped)

    def half_deleted(path, *_):
        deleting = path.name.endswith(".jasr-deleting") and path.exists()
        for file in [f for f in path.rglob("*") if f.is_file()][::2] if deleting else ():
            file.unlink()
        return deleting

    if instant == "items written":
        around(steps, "seal", lambda *_: True)
    elif instant == "sealed":
        around(steps, "seal", after=True)
    elif instant == "manifest not renamed":
        around(files.os, "replace", lambda _, target: str(target).endswith(files.MANIFEST))
    elif instant == "committed":
        around(steps, "sync_directory", lambda path: path == directory)
    else:
        around(files.shutil, "rmtree", half_deleted)


def outcome(workdir):
    """What a finished run has done, {name: JSON}: see `facts`.

    Found out in a fork, since the process that forks runs may not have started JAX.
    """
    target = workdir / "outcome.json"
    os.waitpid(fork(lambda: target.write_text(json.dumps(facts(workdir)))), 0)
    return json.loads(target.read_text())


def facts(workdir):
    """The last step's number, a digest of each tree in it, and what was read at each position."""
    from jasr import checkpoint
    from jasr.checkpoint.read import leaves

    directory = checkpoint.find_step(workdir)
    found = {"the last step": checkpoint.load_meta(directory)["step"]}
    for name in checkpoint.items(directory):
        digest = hashlib.sha256()
        for path, leaf in sorted(leaves(checkpoint.load_params(directory, item=name)).items()):
            digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
        found[name] = digest.hexdigest()
    for line in (workdir / "seen.jsonl").read_text().splitlines():
        if line.endswith("]"):  # not cut off by a kill
            position, *batch = json.loads(line)
            read = found.setdefault(f"batch {position}", [])
            if batch not in read:  # two ways to read it would be two entries
                read.append(batch)
    return found


if __name__ == "__main__":
    sys.exit(main())
