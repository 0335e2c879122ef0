"""Row `step`: the whole training step of a recipe, on random audio of one bucket's shape.

    python -m experiments.benchmark step                                    # AN4's recipe
    python -m experiments.benchmark step --recipe=lact_librispeech:improved --dtype=bfloat16

Features, augmentation, model, CTC, gradient, clipping, AdamW and moving average, as training runs
them, on `rows` utterances of `seconds` and `tokens`. There is no peer that trains this model; what
it prints is audio-seconds a second, and the analytic count of the model's floating-point operations
(three forward passes) over the time and, with --peak_tflops, as a share of the device's peak.
"""

import functools
import importlib
import json

import numpy as np

from experiments.bench import timing


def main(argv=None):
    numbers = dict(rows=8, seconds=8.0, tokens=64, rounds=9, peak_tflops=0.0)
    parser = timing.parser("step", __doc__, **numbers)
    parser.add_argument("--recipe", default="lact_an4", help="configs/NAME.py[:variant]")
    parser.add_argument("--dtype", default="", help="instead of the recipe's")
    args = parser.parse_args(argv)
    name, _, variant = args.recipe.partition(":")
    recipe = importlib.import_module(f"configs.{name}").get_config(variant)
    config = json.loads(recipe.to_json())
    if args.dtype:
        config["model"]["dtype"] = args.dtype
    measure(config, args)


def random_batch(args, vocabulary, sample_rate):
    """A batch of noise with random tokens."""
    rng = np.random.default_rng(0)
    samples = int(args.seconds * sample_rate)
    return {
        "audio": rng.normal(size=(args.rows, samples)).astype(np.float32) * 0.1,
        "audio_len": np.full(args.rows, samples, np.int32),
        "tokens": rng.integers(1, vocabulary, (args.rows, args.tokens)).astype(np.int32),
        "token_len": np.full(args.rows, args.tokens, np.int32),
        "index": np.arange(args.rows),
    }


def measure(config, args):
    import jax

    from experiments.bench import lact_flops
    from jasr import settings, text, tree
    from jasr.systems import loading
    from jasr.training import optim, step

    tokenizer = text.CharTokenizer((text.BLANK, *config["text"]["vocabulary"]))
    task = loading.build(config, tokenizer)
    opt = settings.build(optim.OptimConfig, config["optim"])
    batch = jax.device_put(random_batch(args, tokenizer.vocab_size, task.front_end.sample_rate))
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: task.init(key, batch))["params"]
    tx, _ = optim.make(opt, shapes, config["train"]["steps"])
    init = jax.jit(lambda: step.init_state(task, tx, key, batch, lambda _: False, opt.ema > 0))
    state = init()
    run = jax.jit(functools.partial(step.train_step, task, tx, opt), donate_argnums=0)
    program = run.lower(state, batch).compile()
    box = [state]

    def once():
        box[0], metrics = program(box[0], batch)
        jax.block_until_ready(metrics)

    times = timing.interleave({"step": once}, rounds=args.rounds, warmup=2)
    median = timing.quartiles(times["step"])[1]
    frames = jax.eval_shape(task.features, batch)[0].shape[1]
    flops = 3 * args.rows * sum(lact_flops.forward(task.config, frames).values())
    memory = program.memory_analysis()
    extra = [
        timing.machine(),
        f"{tree.count(shapes) / 1e6:.2f} M parameters, {config['model']['dtype']}",
        *timing.speeds(times, args.rows * args.seconds),
        f"{flops / 1e9:.1f} GFLOP a step, {flops / median / 1e12:.3f} TFLOP/s",
    ]
    if args.peak_tflops:
        share = flops / median / 1e12 / args.peak_tflops
        extra.append(f"{100 * share:.1f} % of the peak, {args.peak_tflops:g} TFLOP/s")
    if memory is not None:
        extra.append(f"{memory.temp_size_in_bytes / 2**20:.0f} MiB working memory")
    timing.report(f"training step, {args.rows} x {args.seconds} s", times, ours="step", extra=extra)
