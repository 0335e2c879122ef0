"""Check-up of numbers: every stage of a model in order, and the first that is not finite.

    python -m experiments.doctor numerics --checkpoint=runs/an4 [--step=600] [--item=ema]
    python -m experiments.doctor numerics --config=configs/lact_librispeech.py:improved
    python -m experiments.doctor numerics --checkpoint=best_model.pt --audio a.wav b.flac

Without --audio it listens to noise, speech-like bursts, digital silence, a very quiet and a clipped
recording of different lengths. Each dtype is run in evaluation and in training (batch statistics,
dropout, gradient). float16 is what jasr never computes: it shows what the front end would give if
it ran in half precision, as the original LaCT ASR did. The exit status is 0 only if all is finite.
"""

import argparse
import ast
import dataclasses
import functools
import json
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np

from jasr import audio as jasr_audio
from jasr import checkpoint, compilation_cache, settings, tree
from jasr.losses.ctc import ctc_loss
from jasr.systems import loading
from jasr.training import start

LETTERS = " etaonihsrdlumcwfgypbvk'xjqz"


class Row(typing.NamedTuple):
    """One stage: min, max, mean and std are those of its finite values."""

    stage: str
    dtype: str
    shape: tuple
    bad: int  # values that are NaN or infinite
    min: float
    max: float
    mean: float
    std: float


def summarise(x):
    """f32[5]: the number of non-finite values of x; min, max, mean and std of the others."""
    if x.size == 0:
        return jnp.zeros(5)
    x = x.astype(jnp.float32)
    ok = jnp.isfinite(x)
    count = jnp.sum(ok)
    some = jnp.maximum(count, 1)
    low, high = jnp.min(jnp.where(ok, x, jnp.inf)), jnp.max(jnp.where(ok, x, -jnp.inf))
    mean = jnp.sum(jnp.where(ok, x, 0)) / some
    std = jnp.sqrt(jnp.sum(jnp.where(ok, jnp.square(x - mean), 0)) / some)
    values = jnp.where(count > 0, jnp.stack([low, high, mean, std]), jnp.nan)
    return jnp.concatenate([(x.size - count)[None].astype(jnp.float32), values])


def report(stages):
    """A `Row` for each of {name: array}, in their order."""
    return _rows(stages, jax.jit(lambda s: [summarise(x) for x in s])(list(stages.values())))


def _rows(kinds, summaries):
    """Rows of {name: something with dtype and shape} and their `summarise`d values."""
    rows = []
    for (name, kind), values in zip(kinds.items(), summaries, strict=True):
        bad, *others = (float(v) for v in values)
        rows.append(Row(name, str(kind.dtype), tuple(kind.shape), int(bad), *others))
    return rows


def first_bad(rows):
    """The first row with values that are not finite, or None."""
    return next((row for row in rows if row.bad), None)


# ---- the walk ------------------------------------------------------------------------------------


def make_walk(task, *, train=False, dtype=""):
    """A function (variables, batch) -> rows of every stage from the audio to the loss, in the order
    in which they are computed; compiled once.

    Args:
      task: a CTC task (`jasr.systems.loading`).
      train: with batch statistics, dropout and, last, the norm of the loss's gradient.
      dtype: the model's dtype in place of its own.
    """
    config = dataclasses.replace(task.config, dtype=dtype or task.config.dtype, remat=False)
    model, kinds = task.model.clone(config=config), {}

    def loss(params, batch_stats, batch):
        mel, mel_len = task.features(batch)
        out, aux = model.apply(
            {"params": params, "batch_stats": batch_stats},
            mel,
            mel_len,
            train=train,
            rngs={"dropout": jax.random.key(0)} if train else None,
            mutable=["stages", "batch_stats"],
        )
        logits, length = out["logits"], out["logit_len"]
        tokens, token_len = batch["tokens"], batch["token_len"]
        losses, _ = ctc_loss(logits, length, tokens, token_len, blank=task.tokenizer.blank_id)
        # a dict that leaves jit comes back sorted, so the order is taken here
        sown = {name: x[0] for name, x in tree.flatten(aux["stages"]).items()}
        found = {"audio": batch["audio"], **sown}
        found |= {"log_probs": jax.nn.log_softmax(logits), "ctc_loss": losses}
        kinds.update({k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in found.items()})
        return jnp.mean(losses / jnp.maximum(token_len, 1)), [summarise(x) for x in found.values()]

    @jax.jit
    def run(variables, batch):
        args = variables["params"], variables["batch_stats"], batch
        if not train:
            return loss(*args)[1]
        grads, summaries = jax.grad(loss, has_aux=True)(*args)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        kinds["gradient_norm"] = jax.ShapeDtypeStruct((1,), jnp.float32)
        return [*summaries, summarise(norm[None])]

    def walk(variables, batch):
        summaries = run(variables, batch)
        return _rows(kinds, jax.device_get(summaries))

    return walk


def bad_weights(variables):
    """Paths of the variables that hold NaN or infinite values, with how many."""
    counts = {path: int(np.sum(~np.isfinite(x))) for path, x in tree.flatten(variables).items()}
    return {path: count for path, count in counts.items() if count}


def half_precision_mel(task, batch):
    """The row of the log-mel features if guard and logarithm were computed in float16.

    The original's guard of 1e-8 is below float16's smallest number, 2**-24, so that silence becomes
    log 0 = -inf and every hidden state after it NaN; NeMo's guard is 2**-24 exactly.
    """
    config = dataclasses.replace(task.front_end, normalize="none")
    mel, _ = jasr_audio.log_mel(batch["audio"], batch["audio_len"], config)
    valid = np.asarray(mel)[np.asarray(mel) != config.pad_value]  # what lies beyond the lengths
    with np.errstate(over="ignore", divide="ignore"):
        power = (np.exp(valid.astype(np.float64)) - config.log_guard).clip(0).astype(np.float16)
        half = np.log(power + np.float16(config.log_guard))
    return report({"mel": half})[0]


def make_batch(task, recordings, seed=0):
    """A batch of recordings (list of f32[S] at the task's rate) with random texts that fit them."""
    rng = np.random.default_rng(seed)
    lengths = np.array([len(x) for x in recordings], np.int32)
    audio = np.zeros((len(recordings), max(lengths.max(), task.front_end.win)), np.float32)
    for row, x in zip(audio, recordings, strict=True):
        row[: len(x)] = x
    frames = lengths * (1 / task.front_end.sample_rate / task.seconds_per_frame)
    token_len = np.maximum(frames / 4, 1).astype(np.int32)  # repeats would need more frames
    ids = np.setdiff1d(np.arange(task.tokenizer.vocab_size), [task.tokenizer.blank_id])
    tokens = rng.choice(ids, (len(recordings), token_len.max())).astype(np.int32)
    tokens[np.arange(tokens.shape[1]) >= token_len[:, None]] = 0
    return {"audio": audio, "audio_len": lengths, "tokens": tokens, "token_len": token_len}


def probes(sample_rate=16000, seconds=4.0, seed=0):
    """Recordings (list of f32[S]) that are hard on numbers: noise, silence, a clipped one ..."""
    rng = np.random.default_rng(seed)
    n = int(sample_rate * seconds)
    noise = rng.standard_normal(n)
    t = np.arange(n) / sample_rate
    voice = np.sin(2 * np.pi * 140 * t) * (np.sin(2 * np.pi * 2 * t) > 0)  # bursts between silence
    sounds = (0.1 * noise, 0.3 * voice, 0 * t, 1e-7 * noise, np.sign(voice), noise[: n // 3])
    return [x.astype(np.float32) for x in sounds]


# ---- command -------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.doctor numerics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", default="", help="a run, step, average or original LaCT")
    source.add_argument("--config", default="", help="a recipe, path.py or path.py:variant, fresh")
    parser.add_argument("--step", type=int, default=None)
    parser.add_argument("--item", default="", choices=["", "params", "ema"])
    parser.add_argument(
        "--model", nargs="*", default=[], metavar="KEY=VALUE", help="model settings to change"
    )
    parser.add_argument("--audio", nargs="*", default=[], help="recordings; default: made up")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of made-up recordings")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="also: float16 (front end)")
    parser.add_argument("--modes", default="eval,train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    compilation_cache.enable()
    try:
        changes = dict(_setting(s) for s in args.model)
        if args.checkpoint:
            task, variables, _ = loading.load(args.checkpoint, args.step, args.item, changes)
        else:
            task, variables = from_recipe(args.config, changes)
        rate = task.front_end.sample_rate
        recordings = [jasr_audio.read(path, rate) for path in args.audio]
    except (ValueError, OSError, checkpoint.CheckpointError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    batch = make_batch(task, recordings or probes(rate, args.seconds), args.seed)
    if variables is None:
        variables = jax.jit(task.init)(jax.random.key(args.seed), batch)
    return check(task, variables, batch, args.dtypes.split(","), args.modes.split(","))


def check(task, variables, batch, dtypes, modes):
    """Prints the report of every dtype and mode; 0 if all is finite, else 1."""
    failures = []
    for path, count in bad_weights(variables).items():
        failures.append(f"weights: {path} has {count} values that are not finite")
    for dtype in dtypes:
        for mode in modes if dtype != "float16" else ["front end only"]:
            print(f"\n{dtype}, {mode}")
            if dtype == "float16":
                rows = [half_precision_mel(task, batch)]
            else:
                rows = make_walk(task, train=mode == "train", dtype=dtype)(variables, batch)
            print(table(rows))
            if bad := first_bad(rows):
                failures.append(
                    f"{dtype}, {mode}: the first stage that is not finite is {bad.stage}"
                )
    print("\n" + ("\n".join(failures) or "every stage is finite"))
    return 1 if failures else 0


def table(rows):
    """The rows as text; a stage that is not finite is marked."""
    width = max(len(row.stage) for row in rows)
    lines = [
        f"  {'stage':<{width}} {'dtype':<9}{'shape':<18}{'not finite':>10}"
        + "".join(f"{name:>12}" for name in ("min", "max", "mean", "std"))
    ]
    for row in rows:
        numbers = "".join(f"{value:>12.4g}" for value in row[4:])
        shape = "x".join(map(str, row.shape))
        mark = "! " if row.bad else "  "
        lines.append(f"{mark}{row.stage:<{width}} {row.dtype:<9}{shape:<18}{row.bad:>10}{numbers}")
    return "\n".join(lines)


def from_recipe(path, changes):
    """(the task of a recipe file, None): its variables are to be initialised.

    Raises:
      ValueError: the file holds no recipe, or settings are wrong.
    """
    import runpy

    name, _, variant = path.partition(":")
    recipe = runpy.run_path(name).get("get_config")
    if recipe is None:
        raise ValueError(f"{name}: no get_config()")
    config = recipe(variant) if variant else recipe()
    config = json.loads(config.to_json()) if hasattr(config, "to_json") else dict(config)
    config["model"] = {**config["model"], **changes}
    words = settings.build(start.TextConfig, config["text"], "config.text")
    given = settings.build(start.InitConfig, config.get("init", {}), "config.init")
    tokenizer = start.make_tokenizer(words, functools.partial(list, [LETTERS]), given)
    return loading.build(config, tokenizer), None


def _setting(assignment):
    """("key", value) of "key=value"."""
    key, equals, value = assignment.partition("=")
    if not equals:
        raise ValueError(f"--model {assignment}: not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


if __name__ == "__main__":
    sys.exit(main())
