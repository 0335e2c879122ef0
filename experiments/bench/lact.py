"""The LaCT layer, forward and backward, beside a plain eager PyTorch version of the same equations.

    python -m experiments.benchmark lact [--frames=4096 --hidden=768 --heads=12 --lact_heads=4
                                          --chunk=512 --rounds=7]
    python -m experiments.benchmark lact --device-report        # a GPU: bf16, share of the peak

The layer is LaCT ASR's of the Base size: projections, sliding-window attention (window = chunk) and
fast weights with momentum, chunks apply-then-update, with and without Muon. PyTorch's attention is
its own fused kernel with the band as a mask. Both sides take the same arrays to the output and the
gradients of input and parameters; these are compared first. Each side is timed, in turns with the
other, in a process of its own: once PyTorch has run in a process, jasr is slower there.
"""

import argparse
import itertools
import os

import numpy as np

from experiments.bench import timing

DEVICE_CHUNKS = (256, 1024, 2048)
SIZES = {  # of --device-report
    "Base": dict(hidden=768, heads=12, lact_heads=4),
    "Improved": dict(hidden=1024, heads=16, lact_heads=8),
    "one big head": dict(hidden=768, heads=12, lact_heads=1),
}


def settings(args):
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
        use_muon=args.muon == "on",
        initializer_range=args.hidden**-0.5,
        lact_mode="causal",
        dtype=args.dtype,
    )


def problem(args):
    """LactConfig, random parameters {path: f32}, input and cotangent [B, L, D]."""
    import jax

    from jasr import tree
    from jasr.layers.attention import rope_table
    from jasr.systems.lact.layer import LactLayer

    config = settings(args)

    def init():
        table = rope_table(1, config.head_dim, config.rope_theta)
        x = np.zeros((1, 1, config.hidden_size), np.float32)
        return LactLayer(config).init(jax.random.key(0), x, np.array([1]), table)

    rng = np.random.default_rng(0)
    params = {k: np.array(v) for k, v in tree.flatten(jax.jit(init)()["params"]).items()}
    for name in params:
        if name.endswith("bias"):
            params[name] = 0.1 * rng.standard_normal(params[name].shape, dtype=np.float32)
    shape = (args.batch, args.frames, config.hidden_size)
    return config, params, *(rng.standard_normal(shape, dtype=np.float32) for _ in range(2))


def jasr_side(args):
    """Thunk -> out, gradients of x, gradients of params {path: array}."""
    import jax
    import jax.numpy as jnp

    from jasr import tree
    from jasr.layers.attention import rope_table
    from jasr.systems.lact.layer import LactLayer

    config, params, x, cotangent = problem(args)
    length = jnp.full(args.batch, args.frames)
    table = rope_table(args.frames, config.head_dim, config.rope_theta)

    def step(params, x, cotangent):
        def layer(params, x):
            return LactLayer(config).apply({"params": params}, x, length, table)[0]

        out, vjp = jax.vjp(layer, params, x)
        d_params, d_x = vjp(cotangent.astype(out.dtype))
        return out, d_x, d_params

    given = jax.device_put((tree.unflatten(params), jnp.asarray(x, config.dtype), cotangent))
    compiled = jax.jit(step).lower(*given).compile()

    def call():
        out, d_x, d_params = jax.block_until_ready(compiled(*given))
        return out, d_x, tree.flatten(d_params)

    return call


def torch_side(args, device="cpu", compiled=False):
    """The same of eager or compiled PyTorch; 16-bit settings run under autocast."""
    import torch

    from experiments.bench import lact_torch
    from jasr.layers.attention import rope_table, visible

    torch.set_num_threads(timing.threads())
    config, params, x, cotangent = problem(args)
    half = config.dtype == "bfloat16"
    to = dict(device=device)
    cos, sin = (
        torch.tensor(np.asarray(t), **to)[None, :, None]
        for t in rope_table(args.frames, config.head_dim, config.rope_theta)
    )
    every = np.arange(args.frames)
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


def compare(ours, theirs, args):
    """Prints the differences of both sides' results; raises where they are not the same layer.

    The bias of the rates is left out: with Muon its gradient is what remains when terms hundreds
    of times its size cancel, on either side.
    """
    mine, other = ours(), theirs()
    out, x = error(mine[0], other[0]), error(mine[1], other[1])
    names = [k for k in mine[2] if k != "lr_proj/bias"]
    worst, name = max((error(mine[2][k], other[2][k]), k) for k in names)
    print(f"  largest difference: out {out:.1e}, d input {x:.1e}, d {name} {worst:.1e}")
    limit = 1e-3 if args.muon == "on" else 1e-4
    if not (out <= limit and x <= 3 * limit and worst <= 3 * limit):
        raise SystemExit("the two sides do not compute the same layer")


def forward_flops(args):
    """{part: floating-point operations of one forward pass}, by the analytic count."""
    from experiments.bench import lact_flops

    found = lact_flops.layer(settings(args), args.frames)
    return {part: args.batch * n for part, n in found.items()}


def changed(args, **values):
    """The options with some of them replaced."""
    return argparse.Namespace(**vars(args) | values)


# ---- reports -------------------------------------------------------------------------------------


def cpu_report(args):
    shape = f"{args.batch} x {args.frames} frames"
    print(f"LaCT layer, forward + backward, {shape}; {timing.machine()}")
    sides = {"jasr": jasr_side, "torch eager": torch_side}
    for muon in ("off", "on") if args.muon == "both" else (args.muon,):
        run = changed(args, muon=muon)
        compare(jasr_side(run), torch_side(run), run)
        lines = {name: timing.served(side, run) for name, side in sides.items()}
        times = timing.in_turns(lines, args.rounds)
        counted = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in forward_flops(run).items())
        memory = timing.peak_memory(sides, [run], [changed(run, frames=3 * args.chunk)])
        title = f"layer {'with' if muon == 'on' else 'without'} Muon, chunk {args.chunk}"
        extra = [f"forward GFLOP: {counted}", *memory]
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
    for name, chunk, muon in itertools.product(SIZES, DEVICE_CHUNKS, ("off", "on")):
        run = changed(args, **SIZES[name], chunk=chunk, muon=muon, dtype="bfloat16")
        thunks = {"jasr": jasr_side(run)}
        if with_torch:
            thunks["torch eager"] = torch_side(run, "cuda")
            thunks["torch.compile"] = torch_side(run, "cuda", compiled=True)
            want = torch_side(changed(run, dtype="float32"), "cuda")()[0].cpu()
            for side, thunk in thunks.items():
                got = thunk()[0]
                got = got if side == "jasr" else got.float().cpu()
                print(f"  {side}: out differs by {error(got, want):.1e} from torch f32")
        times = timing.interleave(thunks, rounds=args.rounds, warmup=2)
        extra = timing.speeds(times, args.batch * args.frames, "tokens")
        flops = 3 * sum(forward_flops(run).values())
        for side, seconds in times.items():
            share = flops / timing.quartiles(seconds)[1] / args.peak_flops
            extra.append(f"{side}: {100 * share:.1f} % of the peak")
        title = f"{name}, chunk {chunk}, Muon {muon}"
        peer = "torch eager" if with_torch else None
        timing.report(title, times, ours="jasr", peer=peer, extra=extra)
    return 0


def main(argv=None):
    numbers = dict(frames=4096, batch=1, hidden=768, heads=12, lact_heads=4, chunk=512, rounds=7)
    parser = timing.parser("lact", __doc__, **numbers)
    parser.add_argument("--muon", choices=("both", "on", "off"), default="both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device-report", action="store_true", help="GPU, bf16, several sizes")
    parser.add_argument("--peak_flops", type=float, default=989e12, help="H100 and H200, bf16")
    args = parser.parse_args(argv)
    chunk = max(DEVICE_CHUNKS) if args.device_report else args.chunk
    if args.frames <= chunk:
        parser.error(f"--frames must be above the chunk, {chunk}: else nothing is ever updated")
    return device_report(args) if args.device_report else cpu_report(args)
