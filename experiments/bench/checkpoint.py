"""Averaging of checkpoints beside the usual PyTorch loop.

    python -m experiments.benchmark checkpoint [--millions=100 --members=5 --rounds=5 --dir=DIR]

The loop of icefall and ESPnet (torch.load one file after another, add, divide, torch.save) beside
`jasr.averaging.average_checkpoints` on steps written by `jasr.checkpoint`, each call in a process
of its own, so that its peak memory is its own; imports are not timed. jasr always flushes its
result to the disk and computes its checksums, so PyTorch is also timed with a flush. The files, of
so many million parameters each, are in the page cache for both sides. Then one step is read back
beside torch.load in one process, every array summed by numpy.
"""

import os
import pathlib
import tempfile
import time

import numpy as np

from experiments.bench import timing


def main(argv=None):
    parser = timing.parser("checkpoint", __doc__, millions=100.0, members=5, rounds=5)
    parser.add_argument("--dir", default="", help="where the files go (a temporary directory)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.dir or None) as folder:
        size = write_members(pathlib.Path(folder), args.millions, args.members)
        averaging(folder, args, size)
        loading(pathlib.Path(folder), args)


def make_tree(millions, seed):
    """Parameters of a Transformer's shapes, about so many million of them: {path: f32}."""
    rng = np.random.default_rng(seed)
    width = 512
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width)}
    shapes |= {"down": (4 * width, width), "bias": (4 * width,), "scale": (width,)}
    layers = -(-int(millions * 1e6) // sum(map(np.prod, shapes.values())))
    return {
        f"layer_{i}/{name}/kernel": rng.standard_normal(shape, dtype=np.float32)
        for i in range(layers)
        for name, shape in shapes.items()
    }


def write_members(folder, millions, members):
    """Writes the trees for both sides; bytes of one tree."""
    import torch

    from jasr import checkpoint
    from jasr.tree import unflatten

    for step in range(1, members + 1):
        leaves = make_tree(millions, step)
        directory, items = folder / "run" / "checkpoints" / str(step), {"params": unflatten(leaves)}
        metrics = {"val_wer": step / 100}
        checkpoint.save_step(directory, items, {"step": step}, metrics, step=step)
        torch.save({k: torch.from_numpy(v) for k, v in leaves.items()}, folder / f"{step}.pt")
    return sum(x.nbytes for x in leaves.values())


def torch_side(folder, members, flush):
    """Call -> the loop that ESPnet and icefall run, one file in memory beside the sum."""
    import torch

    torch.set_num_threads(timing.threads())

    def call():
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

    return call


def jasr_side(folder, members, verify):
    """Call -> the average of jasr; `verify`: of members whose checksums are looked at first."""
    import jax
    import tensorstore  # noqa: F401  imports are not timed, nor the start of the devices

    from jasr import averaging

    jax.devices()
    found = averaging.find_members(folder / "run")
    return lambda: averaging.average_checkpoints(found, folder / "average", verify=verify)


SIDES = {
    "torch": (torch_side, False),
    "torch, flushed to disk": (torch_side, True),
    "jasr": (jasr_side, False),
    "jasr verified": (jasr_side, True),
}


def averaged(name, folder, members):
    """[seconds, bytes of memory at the peak] of one average."""
    side, more = SIDES[name]
    call = side(pathlib.Path(folder), members, more)
    before, start = timing.resident("VmRSS"), time.perf_counter()
    call()
    return time.perf_counter() - start, timing.resident("VmHWM") - before


def averaging(folder, args, size):
    """Times and peak memory of both sides, every call in a new process."""
    import torch

    from jasr import checkpoint, tree

    got = {name: [] for name in SIDES}
    for i in range(args.rounds + 1):  # the first warms the page cache
        for name in list(SIDES) if i % 2 == 0 else list(SIDES)[::-1]:
            got[name].append(timing.result(averaged, name, folder, args.members))
    ours = tree.flatten(checkpoint.load_params(f"{folder}/average"))
    theirs = torch.load(f"{folder}/torch.pt", weights_only=True)
    apart = max(float(np.abs(ours[k] - theirs[k].numpy()).max()) for k in ours)
    if apart > 1e-5:
        raise SystemExit(f"the averages are apart by {apart:.1e}: nothing is reported")
    extra = [timing.machine(), f"averages apart by {apart:.1e}; a tree has {size / 1e6:.0f} MB"]
    for name, rows in got.items():
        peak = timing.quartiles([memory / size for _, memory in rows[1:]])[1]
        extra.append(f"{name}: peak memory {peak:.2f} trees")
    times = {name: [seconds for seconds, _ in rows[1:]] for name, rows in got.items()}
    title = f"average of {args.members} checkpoints, {size / 4e6:.0f} M parameters, written back"
    timing.report(title, times, peer="torch", ours="jasr", extra=extra)
    timing.print_ratio(times, "jasr", "torch, flushed to disk")


def loading(folder, args):
    """How fast a tree is read back into memory, every array summed by numpy on both sides."""
    import torch

    from jasr import checkpoint
    from jasr.tree import flatten

    def theirs():
        loaded = torch.load(folder / "1.pt", map_location="cpu", weights_only=True)
        return sum(float(x.numpy().sum()) for x in loaded.values())

    def ours(verify):
        loaded = checkpoint.load_params(folder / "run" / "checkpoints" / "1", verify=verify)
        return sum(float(x.sum()) for x in flatten(loaded).values())

    loads = {"torch.load": theirs}
    loads |= {"load_params": lambda: ours(False), "load_params, verified": lambda: ours(True)}
    times = timing.interleave(loads, args.rounds)
    timing.report("loading, every array summed", times, peer="torch.load", ours="load_params")
    timing.print_ratio(times, "load_params, verified", "torch.load")
