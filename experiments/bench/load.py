"""Loading a .nemo of Parakeet's 110M shape: from the file to weights on the device.

    python -m experiments.benchmark load --nemo_python=.nemo-venv/bin/python   # beside restore_from
    python -m experiments.benchmark load [--layers=17 --d_model=512 --pieces=1024 --rounds=5]

A hybrid TDT and CTC model of random weights is written. jasr: `loading.load` and its variables on
the device. NeMo: ASRModel.restore_from on the CPU. Both in processes of their
own, in turns, after a first load, so that neither imports nor the disk are timed. Weights are
compared first. Then the memory that a load of jasr's takes beyond its result, in another process:
the most private memory at any time (RssAnon, looked at every millisecond; mapped pages of the file
are the system's to take back).
"""

import ctypes
import gc
import os
import tempfile
import threading
import time

import numpy as np

from experiments.bench import models, timing


def main(argv=None):
    numbers = dict(layers=17, d_model=512, pieces=1024, rounds=5)
    parser = timing.parser("load", __doc__, **numbers)
    parser.add_argument("--nemo_python", default="", help="the Python of NeMo's environment")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, folder)


def measure(args, folder):
    """Writes the model, compares, times and prints."""
    from jasr import tree
    from jasr.systems import loading

    want, path = write(args, folder), f"{folder}/model.nemo"
    for name, array in tree.flatten(loading.load(path)[1]).items():
        if array.tobytes() != want[name].tobytes():
            raise SystemExit(f"{name} is not what was written: nothing is reported")
    lines = {"jasr": timing.served(jasr_side, path), **timing.nemo(args, "restore", folder)}
    ready = (lambda: compare(path, f"{folder}/NeMo.npz")) if args.nemo_python else None
    times = timing.in_turns(lines, args.rounds, ready)
    result, peak = (n / 1e6 for n in timing.result(memory, path))
    largest = max(array.nbytes for array in want.values()) / 1e6
    extra = [
        timing.machine(),
        f"{sum(a.size for a in want.values()) / 1e6:.1f} M parameters, weights equal",
        f"memory: {result:.0f} MB of weights, {peak - result:+.0f} MB at the peak "
        f"(the largest tensor has {largest:.1f} MB)",
    ]
    peer = "NeMo" if args.nemo_python else None
    title = f"load a .nemo of {os.path.getsize(path) / 1e6:.0f} MB"
    timing.report(title, times, ours="jasr", peer=peer, extra=extra)


def write(args, folder):
    """Weights {path: array} of a hybrid model, TDT and CTC, that is written."""
    encoder = dict(n_layers=args.layers, d_model=args.d_model, n_heads=8)
    encoder |= {"subsampling_conv_channels": 256}
    task, meta = models.build({"kind": "hybrid", "encoder": encoder}, args.pieces)
    rng = np.random.default_rng(0)
    leaves = models.random_leaves(task, lambda _, shape: rng.random(shape, np.float32))
    models.write(folder, meta, leaves, ["nemo"])
    return leaves


def compare(path, sums):
    """Raises where NeMo's weights, by their sums in a file, are not the model's."""
    from jasr.systems.fastconformer import nemo

    with np.load(sums) as theirs:
        for key, array in nemo.state_dict(nemo.read(path)).items():
            total = array.astype(np.float64).sum()
            if key not in theirs or abs(theirs[key] - total) > 1e-9 * max(1.0, abs(total)):
                raise SystemExit(f"NeMo's {key} is another one: nothing is reported")


# ---- in processes of their own -------------------------------------------------------------------


def jasr_side(path):
    """Thunk -> the variables of a model, on the device."""
    import jax

    from jasr.systems import loading

    return lambda: jax.block_until_ready(jax.device_put(loading.load(path)[1]))


def memory(path):
    """[bytes of the result, most private bytes at any time while it was loaded]."""
    import jax

    load = jasr_side(path)
    load()  # what JAX keeps of its first traces is not counted
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = timing.resident("RssAnon"), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, timing.resident("RssAnon"))
            time.sleep(1e-3)

    thread = threading.Thread(target=watch)
    thread.start()
    variables = load()
    done.set()
    thread.join()
    return sum(x.nbytes for x in jax.tree.leaves(variables)), peak - before
