"""Loading a .nemo of Parakeet's 110M shape: from the file to weights on the device.

    python -m experiments.benchmark load --nemo_python=.nemo-venv/bin/python   # beside restore_from
    python -m experiments.benchmark load [--layers=17 --d_model=512 --pieces=1024 --rounds=5]

A hybrid TDT and CTC model of random weights is written by `interop.nemo.write`. jasr: `tasks.load`
and its variables on the device. NeMo: ASRModel.restore_from on the CPU. Both in processes of their
own, in turns, after a first load, so that neither imports nor the disk are timed. Weights are
compared first. Then the memory that a load of jasr's takes beyond its result, in another process:
the most private memory at any time (RssAnon, looked at every millisecond; mapped pages of the file
are the system's to take back).
"""

import argparse
import ctypes
import gc
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from experiments.bench import timing

RIVAL = pathlib.Path(__file__).resolve().parents[2] / "third_party" / "nemo" / "rival.py"
DURATIONS = (0, 1, 2, 3, 4)
HIDDEN = 640  # of the prediction and the joint network


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmark load", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--d_model", type=int, default=512)
    parser.add_argument("--pieces", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nemo_python", default="", help="the Python of NeMo's environment")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    parser.add_argument("--memory", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        timing.serve(lambda: load(args.serve))
        return 0
    if args.memory:
        print(*memory(args.memory))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, pathlib.Path(folder))


def measure(args, folder):
    """Writes the model, compares, times and prints."""
    from jasr import tree
    from jasr.systems import loading
    from jasr.systems.fastconformer import nemo

    model, path = random_model(args), str(folder / "model.nemo")
    nemo.write(path, model)
    _, variables, _ = loading.load(path)
    want = tree.flatten(model.variables)
    for name, array in tree.flatten(variables).items():
        if array.tobytes() != want[name].tobytes():
            raise SystemExit(f"{name} is not what was written: nothing is reported")
    del variables
    row = [sys.executable, "-m", "experiments.bench.load"]
    lines = {"jasr": [*row, f"--serve={path}"]}
    if args.nemo_python:
        lines["NeMo"] = [args.nemo_python, str(RIVAL), "restore", f"--model={path}"]
        lines["NeMo"] += [f"--output={folder / 'sums.npz'}", f"--threads={timing.threads()}"]
    times = timing.in_turns(lines, args.rounds, lambda: compare(model, folder / "sums.npz"))
    done = subprocess.run([*row, f"--memory={path}"], capture_output=True, text=True, check=True)
    result, peak = (float(x) / 1e6 for x in done.stdout.split())
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
    return 0


def random_model(args):
    """A NemoModel: hybrid, TDT and CTC, with random weights."""
    import jax

    from jasr import text
    from jasr.audio.features import FrontEndConfig
    from jasr.models.fastconformer.settings import FastConformerConfig
    from jasr.settings import to_dict
    from jasr.systems.fastconformer import nemo, nemo_config
    from jasr.systems.fastconformer.transducer import JointConfig, PredictionConfig
    from jasr.text import sentencepiece_model as spm

    encoder = FastConformerConfig(
        n_layers=args.layers,
        d_model=args.d_model,
        n_heads=8,
        subsampling="dw_striding",
        subsampling_factor=8,
        subsampling_conv_channels=256,
        conv_kernel_size=9,
        xscaling=False,
    )
    joint = JointConfig(args.pieces, args.d_model, HIDDEN, HIDDEN, num_extra_outputs=len(DURATIONS))
    loss = {"kind": "tdt", "durations": DURATIONS, "reduction": "mean_batch", "sigma": 0.02}
    loss |= {"omega": 0.1, "fastemit_lambda": 0.0, "clamp": -1.0}
    config = {
        "front_end": to_dict(FrontEndConfig()),
        "encoder": to_dict(encoder),
        "decoder": to_dict(PredictionConfig(args.pieces, pred_hidden=HIDDEN)),
        "joint": to_dict(joint),
        "loss": {**loss, "ctc_weight": 0.3, "ctc_reduction": "mean_batch"},
        "decoding": {"strategy": "greedy_batch", "max_symbols": 10},
    }
    rng = np.random.default_rng(0)
    shapes = nemo.shapes(nemo_config.Settings("hybrid", config), args.pieces)
    variables = jax.tree.map(lambda s: rng.random(s.shape, np.float32), shapes)
    pieces = [spm.Piece.of("<unk>", type=spm.UNKNOWN)]
    pieces += [spm.Piece.of(f"\u2581{n}", -float(n)) for n in range(1, args.pieces)]
    tokenizer = spm.Model((), ()).with_pieces(pieces).with_settings(model_type=1)
    tokenizer = text.SentencePieceTokenizer(tokenizer.to_bytes()).to_dict()
    return nemo.NemoModel("hybrid", config, tokenizer, variables)


def compare(model, path):
    """Raises where NeMo's weights, by their sums in `path`, are not the model's."""
    from jasr.systems.fastconformer import nemo

    if not path.exists():  # without NeMo
        return
    with np.load(path) as theirs:
        for key, array in nemo.state_dict(model).items():
            total = array.astype(np.float64).sum()
            if key not in theirs or abs(theirs[key] - total) > 1e-9 * max(1.0, abs(total)):
                raise SystemExit(f"NeMo's {key} is another one: nothing is reported")


# ---- in processes of their own -------------------------------------------------------------------


def load(path):
    """The variables of a model, on the device."""
    import jax

    from jasr.systems import loading

    _, variables, _ = loading.load(path)
    return jax.block_until_ready(jax.device_put(variables))


def memory(path):
    """(bytes of the result, most private bytes at any time while it was loaded)."""
    import jax

    load(path)  # what JAX keeps of its first traces is not counted
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = private(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, private())
            time.sleep(1e-3)

    thread = threading.Thread(target=watch)
    thread.start()
    variables = load(path)
    done.set()
    thread.join()
    return sum(x.nbytes for x in jax.tree.leaves(variables)), peak - before


def private():
    """RssAnon of this process in bytes (Linux)."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


if __name__ == "__main__":
    sys.exit(main())
