"""The LaCT layer, forward and backward, beside a plain eager PyTorch version of the same equations.

    python -m experiments.benchmark lact [--frames=4096 --hidden=768 --heads=12 --lact_heads=4
                                          --chunk=512 --rounds=7]
    python -m experiments.benchmark lact --device-report        # a GPU: bf16, share of the peak

The layer is LaCT ASR's of the Base size: projections, sliding-window attention (window = chunk) and
fast weights with momentum, chunks apply-then-update, with and without Muon. PyTorch's attention is
its own fused kernel with the band as a mask. Both sides take the same arrays to the output and the
gradients of input and parameters; these are compared first. Each side is timed, in turns with the
other, in a process of its own: once PyTorch has run in a process, jasr is slower there. Peak
memory is the growth of the resident set over one call, again in a process of each side.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np

from experiments.bench import timing

DEVICE_CHUNKS = (256, 1024, 2048)
PEAK_FLOPS = 989e12  # H100 and H200, dense bf16


def settings(args, muon):
    """The layer's LactConfig."""
    from jasr.systems.lact.settings import LactConfig

    return LactConfig(
        hidden_size=args.hidden,
        num_attn_heads=args.heads,
        num_lact_heads=args.lact_heads,
        lact_chunk_size=args.chunk,
        window_size=args.chunk,
        rope_theta=1e6,
        fw_base_lr=0.01,
        use_muon=muon,
        initializer_range=args.hidden**-0.5,
        lact_mode="causal",
        dtype=args.dtype,
    )


def problem(config, batch, frames, seed=0):
    """Random parameters {path: f32}, input and cotangent [B, L, D]."""
    import jax

    from jasr import tree
    from jasr.layers.attention import rope_table
    from jasr.systems.lact.layer import LactLayer

    def init():
        table = rope_table(1, config.head_dim, config.rope_theta)
        x = np.zeros((1, 1, config.hidden_size), np.float32)
        return LactLayer(config).init(jax.random.key(seed), x, np.array([1]), table)

    rng = np.random.default_rng(seed)
    params = {k: np.array(v) for k, v in tree.flatten(jax.jit(init)()["params"]).items()}
    for name in params:
        if name.endswith("bias"):
            params[name] = 0.1 * rng.standard_normal(params[name].shape, dtype=np.float32)
    shape = (batch, frames, config.hidden_size)
    return params, *(rng.standard_normal(shape, dtype=np.float32) for _ in range(2))


def jasr_side(config, params, x, cotangent):
    """(thunk -> out, grads of x, grads of params; bytes that the compiled step needs)."""
    import jax
    import jax.numpy as jnp

    from jasr import tree
    from jasr.layers.attention import rope_table
    from jasr.systems.lact.layer import LactLayer

    frames = x.shape[1]
    length = jnp.full(x.shape[0], frames)
    table = rope_table(frames, config.head_dim, config.rope_theta)

    def step(params, x, cotangent):
        def layer(params, x):
            return LactLayer(config).apply({"params": params}, x, length, table)[0]

        out, vjp = jax.vjp(layer, params, x)
        d_params, d_x = vjp(cotangent.astype(out.dtype))
        return out, d_x, d_params

    args = jax.device_put((tree.unflatten(params), jnp.asarray(x, config.dtype), cotangent))
    compiled = jax.jit(step).lower(*args).compile()
    memory = compiled.memory_analysis()

    def call():
        out, d_x, d_params = jax.block_until_ready(compiled(*args))
        return out, d_x, tree.flatten(d_params)

    return call, memory.temp_size_in_bytes + memory.output_size_in_bytes


def torch_side(config, params, x, cotangent, device="cpu", compiled=False):
    """Thunk -> out, grads of x, grads of params; 16-bit settings run under autocast."""
    import torch

    from experiments.bench import lact_torch
    from jasr.layers.attention import rope_table, visible

    torch.set_num_threads(timing.threads())
    frames = x.shape[1]
    half = config.dtype == "bfloat16"
    to = dict(device=device)
    cos, sin = (
        torch.tensor(np.asarray(t), **to)[None, :, None]
        for t in rope_table(frames, config.head_dim, config.rope_theta)
    )
    every = np.arange(frames)
    band = torch.tensor(visible(every, every, causal=True, window=config.window_size), **to)
    p = {k: torch.tensor(v, **to).requires_grad_(True) for k, v in params.items()}
    x = torch.tensor(x, **to).requires_grad_(True)
    cotangent = torch.tensor(cotangent, **to)
    layer = torch.compile(lact_torch.layer) if compiled else lact_torch.layer

    def call():
        with torch.autocast(device, torch.bfloat16, enabled=half):
            out = layer(p, x, cos, sin, band, config)
        grads = torch.autograd.grad(out, [x, *p.values()], cotangent.to(out.dtype))
        if device != "cpu":
            torch.cuda.synchronize()
        return out.detach(), grads[0], dict(zip(p, grads[1:], strict=True))

    return call


def error(got, want):
    """Largest difference as a share of the largest value."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def compare(ours, theirs, muon):
    """Prints the differences of both sides' results; raises where they are not the same layer.

    The bias of the rates is left out: with Muon its gradient is what remains when terms hundreds
    of times its size cancel, on either side.
    """
    mine, other = ours(), theirs()
    out, x = error(mine[0], other[0]), error(mine[1], other[1])
    names = [k for k in mine[2] if k != "lr_proj/bias"]
    worst, name = max((error(mine[2][k], other[2][k]), k) for k in names)
    print(f"  largest difference: out {out:.1e}, d input {x:.1e}, d {name} {worst:.1e}")
    limit = 1e-3 if muon else 1e-4
    if not (out <= limit and x <= 3 * limit and worst <= 3 * limit):
        raise SystemExit("the two sides do not compute the same layer")


def forward_flops(config, batch, frames):
    """{part: floating-point operations of one forward pass}, by the analytic count."""
    from experiments.bench import lact_flops

    return {part: batch * n for part, n in lact_flops.layer(config, frames).items()}


# ---- memory --------------------------------------------------------------------------------------


def resident(key):
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def trim():
    """Gives unused memory back; the high-water mark VmHWM starts again."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def growth(call):
    """Bytes by which the resident set rises, at its highest, over one call."""
    trim()
    before = resident("VmRSS")
    results = call()
    high = resident("VmHWM")
    del results
    return high - before


def thunk(side, args, frames):
    """The step of one side on so many frames."""
    config = settings(args, args.muon == "on")
    make = torch_side if side == "torch" else lambda *a: jasr_side(*a)[0]
    return make(config, *problem(config, args.batch, frames))


def memory_of(side, args):
    """Prints JSON: growth of the resident set over one step of one side, without its warm-up.

    The warm-up is the same step on three chunks: libraries, thread pools and code are loaded then.
    """
    thunk(side, args, 3 * args.chunk)()
    print(json.dumps({"bytes": growth(thunk(side, args, args.frames))}))


def command(task, side, args, muon):
    """The command line of this module that does `task` ("memory_of", "serve") for a side."""
    options = ("frames", "batch", "hidden", "heads", "lact_heads", "chunk", "dtype")
    line = [sys.executable, "-m", "experiments.bench.lact", f"--{task}={side}"]
    line += [f"--{k}={getattr(args, k)}" for k in options]
    return [*line, f"--muon={'on' if muon else 'off'}"]


def memory(side, args, muon):
    """Bytes of `memory_of` in a fresh process."""
    line = command("memory_of", side, args, muon)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["bytes"]


# ---- reports -------------------------------------------------------------------------------------


def cpu_report(args):
    print(
        f"LaCT layer, forward + backward, {args.batch} x {args.frames} frames; {timing.machine()}"
    )
    for muon in {"both": (False, True), "off": (False,), "on": (True,)}[args.muon]:
        config = settings(args, muon)
        arrays = problem(config, args.batch, args.frames)
        ours, compiled_bytes = jasr_side(config, *arrays)
        theirs = torch_side(config, *arrays)
        compare(ours, theirs, muon)
        del ours, theirs
        sides = {"jasr": "jasr", "torch eager": "torch"}
        lines = {name: command("serve", side, args, muon) for name, side in sides.items()}
        times = timing.in_turns(lines, args.rounds)
        flops = forward_flops(config, args.batch, args.frames)
        extra = [f"forward GFLOP: {', '.join(f'{k} {v / 1e9:.1f}' for k, v in flops.items())}"]
        if os.path.exists("/proc/self/clear_refs"):
            used = {side: memory(side, args, muon) for side in ("jasr", "torch")}
            extra.append(
                f"peak memory: jasr {used['jasr'] / 2**20:.0f} MiB "
                f"(compiled: {compiled_bytes / 2**20:.0f}), torch {used['torch'] / 2**20:.0f} MiB, "
                f"ratio {used['jasr'] / used['torch']:.2f}"
            )
        title = f"layer {'with' if muon else 'without'} Muon, chunk {args.chunk}"
        timing.report(title, times, ours="jasr", peer="torch eager", extra=extra)


def device_report(args):
    """bf16 on a GPU: tokens a second and share of the peak, against torch eager and compiled."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if jax.default_backend() != "gpu":
        print("--device-report needs a GPU that jax sees; the devices are", jax.devices())
        return 1
    try:
        import torch

        with_torch = torch.cuda.is_available()
    except ImportError:
        with_torch = False
    print(f"LaCT layer in bf16, forward + backward; {timing.machine()}")
    base = dict(hidden=768, heads=12, lact_heads=4)
    improved = dict(hidden=1024, heads=16, lact_heads=8)
    sizes = {"Base": base, "Improved": improved, "one big head": dict(base, lact_heads=1)}
    for (name, size), chunk in ((s, c) for s in sizes.items() for c in DEVICE_CHUNKS):
        for muon in (False, True):
            run = argparse.Namespace(**vars(args) | size | dict(chunk=chunk, dtype="bfloat16"))
            config = settings(run, muon)
            arrays = problem(config, args.batch, args.frames)
            thunks = {"jasr": jasr_side(config, *arrays)[0]}
            if with_torch:
                thunks["torch eager"] = torch_side(config, *arrays, device="cuda")
                compiled = torch_side(config, *arrays, device="cuda", compiled=True)
                thunks["torch.compile"] = compiled
                single = dataclasses.replace(config, dtype="float32")
                want = torch_side(single, *arrays, device="cuda")()[0].cpu()
                for side in thunks:
                    got = thunks[side]()[0]
                    got = got.float().cpu() if hasattr(got, "cpu") else got
                    print(f"  {side}: out differs by {error(got, want):.1e} from torch f32")
            times = timing.interleave(thunks, rounds=args.rounds, warmup=2)
            flops = 3 * sum(forward_flops(config, args.batch, args.frames).values())
            extra = []
            for side, seconds in times.items():
                middle = timing.quartiles(seconds)[1]
                extra.append(
                    f"{side}: {args.batch * args.frames / middle:,.0f} tokens/s, "
                    f"{100 * flops / middle / args.peak_flops:.1f} % of the peak"
                )
            title = f"{name}, chunk {chunk}, Muon {'on' if muon else 'off'}"
            peer = "torch eager" if with_torch else None
            timing.report(title, times, ours="jasr", peer=peer, extra=extra)
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = dict(
        frames=4096, batch=1, hidden=768, heads=12, lact_heads=4, chunk=512, rounds=7
    )  # fmt: skip
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--muon", choices=("both", "on", "off"), default="both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device-report", action="store_true", help="GPU, bf16, several sizes")
    parser.add_argument("--peak_flops", type=float, default=PEAK_FLOPS)
    for task in ("memory_of", "serve"):
        parser.add_argument(f"--{task}", choices=("jasr", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    chunk = max(DEVICE_CHUNKS) if args.device_report else args.chunk
    if args.frames <= chunk:
        parser.error(f"--frames must be above the chunk, {chunk}: else nothing is ever updated")
    if args.memory_of:
        return memory_of(args.memory_of, args)
    if args.serve:
        return timing.serve(thunk(args.serve, args, args.frames))
    return device_report(args) if args.device_report else cpu_report(args)


if __name__ == "__main__":
    sys.exit(main())
