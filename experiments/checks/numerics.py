"""Check-up of numbers: the first operation of a model whose result is NaN, with its source line.

    python -m experiments.doctor numerics --checkpoint=runs/an4 [--step=600] [--item=ema]
    python -m experiments.doctor numerics --config=configs/lact_librispeech.py:improved
    python -m experiments.doctor numerics --checkpoint=best_model.pt --audio a.wav b.flac

Without --audio it listens to noise, speech-like bursts, digital silence, a very quiet and a clipped
recording of different lengths. Each dtype is run in evaluation (the validation loss) and in
training (batch statistics, dropout, gradient). float16 is what jasr never computes: it shows what
the front end would give if it ran in half precision, as the original LaCT ASR did. The exit status
is 0 only if all is finite.
"""

import ast
import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import checkify

import jasr
from experiments import options
from jasr import audio as jasr_audio
from jasr import checkpoint, compilation_cache, settings, tree
from jasr.seam import Item, Piece
from jasr.systems import catalogue, loading
from jasr.training import start

LETTERS = " etaonihsrdlumcwfgypbvk'xjqz"
STRENGTH_STEP = 1 << 20  # at which whatever grows over the first steps has grown


def checked(task, train=False):
    """A function (variables, batch) -> (what is wrong or "", {name: numbers}), compiled once.

    Args:
      task: a seam.Task.
      train: the training loss with the norm of its gradient, else the validation loss.
    """

    def training(variables, batch):
        keys = {"augment": jax.random.key(1), "dropout": jax.random.key(2)}

        def loss(params):
            given, divisors = {**variables, "params": params}, task.divisors(batch)
            return task.loss(given, batch, divisors, keys, jnp.int32(STRENGTH_STEP))[0]

        value, gradient = jax.value_and_grad(loss)(variables["params"])
        return {"loss": value, "gradient_norm": optax.tree.norm(gradient)}

    def evaluation(variables, batch):
        return task.validators["loss"].run(variables, batch, jax.random.key(0))

    run = checkify.checkify(training if train else evaluation, errors=checkify.nan_checks)
    # The program runs once, so that compiling is what one waits for.
    cpu = jax.default_backend() == "cpu"
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0} if cpu else None)

    def check(variables, batch):
        error, found = run(variables, batch)
        found = jax.device_get(found)
        if what := error.get():
            where = places(error.get_exception().traceback_info)
            return f"{what.rstrip('.')} {where}", found
        bad = [name for name, x in found.items() if not np.all(np.isfinite(x))]
        return f"not finite: {', '.join(bad)}" if bad else "", found

    return check


def places(traceback, most=3):
    """The innermost lines of jasr in a traceback that lists the innermost first."""
    root = pathlib.Path(jasr.__file__).parent
    lines = [line.strip() for line in str(traceback).splitlines()]
    ours = [line.removeprefix(f"{root.parent}/") for line in lines if line.startswith(f"{root}/")]
    return f"in {', called from '.join(ours[:most])}" if ours else "before the first line of jasr"


def bad_weights(variables):
    """Paths of the arrays that hold NaN or infinite values, with how many."""
    counts = {path: int(np.sum(~np.isfinite(x))) for path, x in tree.flatten(variables).items()}
    return {path: count for path, count in counts.items() if count}


def half_precision_mel(front_end, batch):
    """How many log-mel values are not finite if guard and logarithm are computed in float16.

    The original's guard of 1e-8 is below float16's smallest number, 2**-24, so that silence becomes
    log 0 = -inf and every hidden state after it NaN; NeMo's guard is 2**-24 exactly.
    """
    front_end = dataclasses.replace(front_end, normalize="none")
    mel, _ = jasr_audio.log_mel(batch["audio"], batch["audio_len"], front_end)
    valid = np.asarray(mel)[np.asarray(mel) != front_end.pad_value]  # what lies beyond the lengths
    with np.errstate(over="ignore", divide="ignore"):
        power = (np.exp(valid.astype(np.float64)) - front_end.log_guard).clip(0).astype(np.float16)
        half = np.log(power + np.float16(front_end.log_guard))
    return int(np.sum(~np.isfinite(half)))


def make_batch(task, recordings, sample_rate, seed=0):
    """A batch of the task's layout with a recording a row, and random texts of two tokens a second.

    recordings: list of f32[S] at `sample_rate` Hz.
    """
    rng, layout, tokenizer = np.random.default_rng(seed), task.layout, task.tokenizer
    ids, items = np.setdiff1d(np.arange(tokenizer.vocab_size), [tokenizer.blank_id]), []
    for n, samples in enumerate(recordings):
        seconds = len(samples) / sample_rate
        text = ""
        while not text:  # a space alone is no text
            text = tokenizer.decode(rng.choice(ids, max(1, int(2 * seconds))).tolist())
        items.append(Item(f"recording {n}", (Piece(samples, seconds=seconds),), {"text": text}))
    none = np.zeros((len(items), 2), np.uint64)
    sizes, _ = layout.drawn(np.array([layout.sizes(item, True) for item in items]), none)
    batch = layout.empty((len(items), *sizes.max(axis=0).tolist()))
    for n, item in enumerate(items):
        layout.fill(batch, n, [item], none[:1])
        batch["index"][n] = n
    return batch


def probes(sample_rate=16000, seconds=4.0, seed=0):
    """Recordings (list of f32[S]) that are hard on numbers: noise, silence, a clipped one ..."""
    rng = np.random.default_rng(seed)
    n = int(sample_rate * seconds)
    noise = rng.standard_normal(n)
    t = np.arange(n) / sample_rate
    voice = np.sin(2 * np.pi * 140 * t) * (np.sin(2 * np.pi * 2 * t) > 0)  # bursts between silence
    sounds = (0.1 * noise, 0.3 * voice, 0 * t, 1e-4 * noise, np.sign(voice), noise[: n // 3])
    return [x.astype(np.float32) for x in sounds]


# ---- command -------------------------------------------------------------------------------------


def main(argv=None):
    parser = options.parser("doctor numerics", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", default="", help="a run, step, average, .nemo ...")
    source.add_argument("--config", default="", help="a recipe, path.py or path.py:variant, fresh")
    options.add_source(parser)
    parser.add_argument(
        "--model", nargs="*", default=[], metavar="KEY=VALUE", help="model settings to change"
    )
    parser.add_argument("--audio", nargs="*", default=[], help="recordings; default: made up")
    parser.add_argument(
        "--sample_rate", type=int, default=0, help="Hz of the recordings (the model's)"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="length of made-up recordings")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="also: float16 (front end)")
    parser.add_argument("--modes", default="eval,train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    compilation_cache.enable()
    try:
        changes = dict(_setting(s) for s in args.model)
        if args.checkpoint:
            task, variables, meta = loading.load(
                args.checkpoint, args.step, args.item, changes, like=args.like
            )
            config = {**meta["config"], "model": {**meta["config"]["model"], **changes}}
        else:
            (config, task), variables = from_recipe(args.config, changes), None
        rate = args.sample_rate or loading.verb(task, "transcribe").sample_rate
        recordings = [jasr_audio.read(path, rate) for path in args.audio]
    except (ValueError, OSError, checkpoint.CheckpointError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    batch = make_batch(task, recordings or probes(rate, args.seconds), rate, args.seed)
    if variables is None:
        variables = jax.jit(task.init)(jax.random.key(args.seed), batch)
    dtypes, modes = args.dtypes.split(","), args.modes.split(",")
    return check(config, task.tokenizer, variables, batch, dtypes, modes)


def check(config, tokenizer, variables, batch, dtypes, modes):
    """Prints what every dtype and mode gives; 0 if all is finite, else 1."""
    failures = []
    for path, count in bad_weights(variables).items():
        failures.append(f"weights: {path} has {count} values that are not finite")
    for name, count in bad_weights(batch).items():
        failures.append(f"recordings: {name} has {count} values that are not finite")
    for dtype in dtypes:
        if dtype == "float16":
            sections = catalogue.sections(catalogue.get(config["task"]))
            if "front_end" not in sections:
                failures.append("float16, front end only: this model has no front end")
                continue
            given = config.get("front_end", {})
            front_end = settings.build(sections["front_end"], given, "config.front_end")
            if bad := half_precision_mel(front_end, batch):
                failures.append(f"float16, front end only: {bad} log-mel values are not finite")
            continue
        task = loading.build(with_dtype(config, dtype), tokenizer)
        for mode in modes:
            wrong, found = checked(task, mode == "train")(variables, batch)
            numbers = ", ".join(f"{k} {np.sum(x):.5g}" for k, x in sorted(found.items()))
            print(f"{dtype}, {mode}: {numbers}")
            if wrong:
                failures.append(f"{dtype}, {mode}: {wrong}")
    print("\n" + ("\n".join(failures) or "everything is finite"))
    return 1 if failures else 0


def with_dtype(config, dtype):
    """The config with every setting of its model that is called dtype at this value."""

    def changed(values, given):
        given = dict(given)
        for item in dataclasses.fields(values):
            value = getattr(values, item.name)
            if item.name == "dtype":
                given["dtype"] = dtype
            elif dataclasses.is_dataclass(value):
                given[item.name] = changed(value, given.get(item.name, {}))
        return given

    defaults = catalogue.sections(catalogue.get(config["task"]))["model"]()
    return {**config, "model": changed(defaults, config["model"])}


def from_recipe(path, changes):
    """(config, task) of a recipe file.

    Raises:
      ValueError: the file holds no recipe, or settings are wrong.
    """
    import runpy

    name, _, variant = path.partition(":")
    recipe = runpy.run_path(name).get("get_config")
    if recipe is None:
        raise ValueError(f"{name}: no get_config()")
    config = recipe(variant) if variant else recipe()
    config = settings.plain(config)
    config = {**config, "model": {**config["model"], **changes}}
    words = settings.build(start.TextConfig, config["text"], "config.text")
    given = settings.build(start.InitConfig, config.get("init", {}), "config.init")
    tokenizer = start.make_tokenizer(words, functools.partial(list, [LETTERS]), given)
    return config, loading.build(config, tokenizer)


def _setting(assignment):
    """("key", value) of "key=value"."""
    key, equals, value = assignment.partition("=")
    if not equals:
        raise ValueError(f"--model {assignment}: not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
