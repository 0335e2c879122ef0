"""Averaging, saving and loading of checkpoints beside the usual PyTorch loop.

    python -m experiments.benchmark checkpoint [--millions=100 --members=5 --rounds=5 --dir=DIR]

Averaging: the loop of icefall and ESPnet (torch.load one file after another, add, divide,
torch.save) beside `jasr.averaging.average_checkpoints` on steps written by `jasr.checkpoint`, each
side in a process of its own, so that its peak memory is its own; imports are not timed. jasr always
flushes its result to the disk and computes its checksums, so PyTorch is also timed with a flush.
Then the average of trees that are in memory, the time for which a save holds up the training step,
and loading. The files are in the page cache for both sides.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from experiments.bench import timing


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=100, help="float32 parameters a tree")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default="", help="where the files go (a temporary directory)")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        print(json.dumps(SIDES[args.side](pathlib.Path(args.dir), args.members)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.dir or None) as folder:
        folder = pathlib.Path(folder)
        size = write_members(folder, args.millions, args.members)
        averaging(folder, args, size)
        in_memory(folder, args)
        loading(folder, args)
        saving(folder, args)
    return 0


def make_tree(millions, seed):
    """Parameters of a Transformer's shapes, about so many million of them."""
    rng = np.random.default_rng(seed)
    width = 512
    tree, left, i = {}, int(millions * 1e6), 0
    while left > 0:
        shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width)}
        shapes |= {"down": (4 * width, width), "bias": (4 * width,), "scale": (width,)}
        tree[f"layer_{i}"] = {
            k: {"kernel": rng.standard_normal(s, dtype=np.float32)} for k, s in shapes.items()
        }
        left -= sum(int(np.prod(s)) for s in shapes.values())
        i += 1
    return tree


def flat(tree):
    from jasr.tree import flatten

    return flatten(tree)


def write_members(folder, millions, members):
    """Writes the trees for both sides; bytes of one tree."""
    import torch

    from jasr import checkpoint

    for seed in range(members):
        tree = make_tree(millions, seed)
        meta, metrics = {"step": seed + 1}, {"val_wer": 0.1 + seed / 100}
        checkpoint.save_step(
            folder / "run" / "checkpoints" / str(seed + 1),
            {"params": tree},
            meta,
            metrics,
            step=seed + 1,
        )
        torch.save(
            {k: torch.from_numpy(v) for k, v in flat(tree).items()}, folder / f"{seed + 1}.pt"
        )
    return sum(x.nbytes for x in flat(tree).values())


def rss():
    """(resident now, peak) in bytes; getrusage would count what the parent had before exec."""
    text = pathlib.Path("/proc/self/status").read_text()
    found = dict(line.split(":", 1) for line in text.splitlines())
    return tuple(int(found[k].split()[0]) * 1024 for k in ("VmRSS", "VmHWM"))


def torch_side(folder, members, flush=False):
    """The loop that ESPnet and icefall run, one file in memory beside the sum."""
    import torch

    torch.set_num_threads(timing.threads())
    base, _ = rss()
    start = time.perf_counter()
    total = None
    for i in range(1, members + 1):
        state = torch.load(folder / f"{i}.pt", map_location="cpu", weights_only=True)
        if total is None:
            total = state
        else:
            for k in total:
                total[k] += state[k]
    for k in total:
        total[k] /= members
    with open(folder / "torch.pt", "wb") as f:
        torch.save(total, f)
        if flush:
            f.flush()
            os.fsync(f.fileno())
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": rss()[1] - base}


def jasr_side(folder, members, verify=False):
    import jax
    import tensorstore  # noqa: F401  imports are not timed, nor the start of the devices

    from jasr import averaging

    jax.devices()
    found = averaging.find_members(folder / "run")
    base, _ = rss()
    start = time.perf_counter()
    averaging.average_checkpoints(found, folder / "average", verify=verify)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": rss()[1] - base}


SIDES = {
    "torch": torch_side,
    "torch, flushed to disk": lambda folder, members: torch_side(folder, members, True),
    "jasr": jasr_side,
    "jasr verified": lambda folder, members: jasr_side(folder, members, True),
}


def averaging(folder, args, size):
    """Times and peak memory of both sides, every call in a new process."""
    import torch

    from jasr import checkpoint

    got = {name: [] for name in SIDES}
    for i in range(args.rounds + 1):  # the first warms the page cache
        names = list(SIDES) if i % 2 == 0 else list(SIDES)[::-1]
        for name in names:
            command = [sys.executable, "-m", "experiments.bench.checkpoint", f"--side={name}"]
            command += [f"--dir={folder}", f"--members={args.members}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if i:
                got[name].append(json.loads(done.stdout.splitlines()[-1]))
    ours = flat(checkpoint.load_params(folder / "average"))
    theirs = torch.load(folder / "torch.pt", weights_only=True)
    apart = max(float(np.abs(ours[k] - theirs[k].numpy()).max()) for k in ours)
    if apart > 1e-5:
        raise SystemExit(f"the averages are apart by {apart:.1e}: nothing is reported")
    extra = [timing.machine(), f"averages apart by {apart:.1e}; a tree has {size / 1e6:.0f} MB"]
    for name, rows in got.items():
        peak = timing.quartiles([r["memory"] / size for r in rows])[1]
        extra.append(f"{name}: peak memory {peak:.2f} trees")
    times = {name: [r["seconds"] for r in rows] for name, rows in got.items()}
    title = f"average of {args.members} checkpoints, {size / 4e6:.0f} M parameters, written back"
    timing.report(title, times, peer="torch", ours="jasr", extra=extra)
    ratios = [a / b for a, b in zip(times["torch, flushed to disk"], times["jasr"], strict=True)]
    print(f"  jasr is {timing.quartiles(ratios)[1]:.2f}x as fast as torch, flushed to disk")


def in_memory(folder, args):
    """The arithmetic alone."""
    import torch

    import jasr
    from jasr import checkpoint

    torch.set_num_threads(timing.threads())
    steps = folder / "run" / "checkpoints"
    trees = [checkpoint.load_params(steps / str(i + 1)) for i in range(args.members)]
    tensors = [{k: torch.from_numpy(np.array(v)) for k, v in flat(t).items()} for t in trees]

    def loop():
        total = {k: v.clone() for k, v in tensors[0].items()}
        for state in tensors[1:]:
            for k in total:
                total[k] += state[k]
        for k in total:
            total[k] /= len(tensors)
        return total

    times = timing.interleave(
        {"torch": loop, "jasr.average": lambda: jasr.average(trees)}, args.rounds
    )
    timing.report("average of trees in memory", times, peer="torch", ours="jasr.average")


def saving(folder, args):
    """How long a save holds up the training step."""
    import jax
    import torch

    from jasr import checkpoint

    params = jax.device_put(make_tree(args.millions, 0))
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in flat(params).items()}
    stall, whole = [], []
    with checkpoint.Checkpoints(folder / "saves", keep_latest=1, keep_best=0, verify=False) as c:
        for i in range(args.rounds):
            start = time.perf_counter()
            c.save(i, {"params": params}, {}, {})
            stall.append(time.perf_counter() - start)
            c.wait()
            whole.append(time.perf_counter() - start)
    saves = {"jasr, the step waits": stall, "jasr, sealed on disk": whole}
    saves |= timing.interleave(
        {"torch.save": lambda: torch.save(tensors, folder / "x.pt")}, args.rounds
    )
    timing.report("saving", saves, peer="torch.save", ours="jasr, the step waits")


def loading(folder, args):
    """How fast a tree is read back into memory, every array summed by numpy on both sides."""
    import torch

    from jasr import checkpoint

    step = folder / "run" / "checkpoints" / "1"

    def theirs():
        loaded = torch.load(folder / "1.pt", map_location="cpu", weights_only=True)
        return sum(float(x.numpy().sum()) for x in loaded.values())

    def ours(verify):
        loaded = flat(checkpoint.load_params(step, verify=verify))
        return sum(float(x.sum()) for x in loaded.values())

    loads = {
        "torch.load": theirs,
        "load_params": lambda: ours(False),
        "load_params, verified": lambda: ours(True),
    }
    times = timing.interleave(loads, args.rounds)
    timing.report("loading, every array summed", times, peer="torch.load", ours="load_params")
    verified = zip(times["load_params, verified"], times["torch.load"], strict=True)
    ratio = timing.quartiles([ours / theirs for ours, theirs in verified])[1]
    print(f"  load_params, verified, takes {ratio:.2f}x the time of torch.load")


if __name__ == "__main__":
    sys.exit(main())
