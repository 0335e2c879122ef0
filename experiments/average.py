"""Averages checkpoints of a run; the result evaluates, transcribes and starts training like a step.

    python -m experiments.average --checkpoint_dir=runs/an4 --top_n=3
    python -m experiments.average --checkpoint_dir=runs/an4 --steps 300 600 --weights 0.3 0.7
    python -m experiments.average --checkpoints runs/a/checkpoints/300 runs/b/checkpoints/300 \\
        --output=runs/soup --evaluate an4/valid.jsonl

NeMo's checkpoints, named step=14000-val_wer=0.0652-val_loss=1.50.ckpt, and its zarr directories:

    python -m experiments.average --checkpoint_dir=ckpts --top_n=3 \\
        --input_nemo=model.nemo --output_nemo=averaged.nemo        # or --output=averaged.ckpt
    python -m experiments.average --checkpoint_dir=zarr_ckpts --name_prefix=avg --steps 1000 2000

Weights: given ones; else, where every member has the metric, in proportion to 1 / metric; else
equal. The result is written to <checkpoint_dir>/average-<name> with jasr_average.json (members,
weights, metrics, checksums) in it. Files and directories named "...-last" or "last" are left out,
averages too, and "...-EMA.ckpt" files without --ema. Nothing that exists is overwritten, but for
the earlier average of a run.
"""

import argparse
import contextlib
import os
import pathlib
import sys
import warnings

from experiments import options
from experiments.errors import in_one_line

KINDS = {"": "runs of jasr", "ckpt": ".ckpt files", "zarr": "zarr checkpoints"}  # `foreign_kind`
# The flags that would do nothing for a kind, and what to do instead.
UNUSED = {
    "": {"name_prefix": "name the result with --name", "ema": "say --item=ema"},
    "ckpt": dict.fromkeys(("name", "name_prefix"), "name it with --output or --output_nemo"),
    "zarr": {
        "name": "name the result with --name_prefix or --output",
        **dict.fromkeys(("metric", "mode"), "their names have no metrics; say --weights"),
        "ema": "it chooses among .ckpt files",
    },
}


def parse(argv=None):
    parser = options.parser("average", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint_dir", help="a run, or a directory of its steps")
    source.add_argument("--checkpoints", nargs="+", help="step directories, of one run or several")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--top_n", type=positive, default=0, help="the best so many by --metric")
    choice.add_argument("--steps", type=int, nargs="+", default=(), help="these step numbers")
    parser.add_argument("--weights", type=float, nargs="+", help="one a member, in their order")
    parser.add_argument("--equal", action="store_true", help="equal weights, metrics or not")
    parser.add_argument("--metric", help="what ranks and weighs (val_wer)")
    parser.add_argument("--mode", choices=("min", "max"), help="which are the best (min)")
    parser.add_argument("--item", default="", help="params or ema; ema where all have it")
    parser.add_argument("--name", default="", help="the result is average-<name>")
    parser.add_argument("--output", default="", help="the result's directory, instead of --name")
    parser.add_argument("--ema", action="store_true", help=".ckpt files: the -EMA.ckpt ones")
    parser.add_argument("--input_nemo", default="", help=".ckpt files: the .nemo they belong to")
    parser.add_argument("--output_nemo", default="", help="it, with the averaged weights")
    parser.add_argument("--name_prefix", default="", help="zarr: of the result's name")
    parser.add_argument(
        "--evaluate", metavar="MANIFEST", default="", help="print WER beside the members'"
    )
    args = parser.parse_args(argv)
    args.foreign = foreign_kind(args.checkpoint_dir) if args.checkpoint_dir else ""
    for reason in wrong(args):
        parser.error(reason)
    args.metric, args.mode = args.metric or "val_wer", args.mode or "min"
    return args


def positive(text):
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {text}")
    return number


def wrong(args):
    """What does not fit together, cannot be read or would be overwritten, before any work."""
    ckpt, zarr = args.foreign == "ckpt", args.foreign == "zarr"
    if args.checkpoint_dir and not (args.top_n or args.steps or args.foreign):
        yield "--checkpoint_dir needs --top_n or --steps"
    if bool(args.input_nemo) != bool(args.output_nemo):
        yield "--input_nemo and --output_nemo go together"
    if args.input_nemo and not ckpt:
        yield "--output_nemo is for a --checkpoint_dir of .ckpt files"
    if ckpt and not (args.output_nemo or args.output):
        yield "name the result: --input_nemo with --output_nemo, or --output=x.ckpt"
    if zarr and not (args.name_prefix or args.output):
        yield "name the result: --name_prefix or --output"
    if zarr and args.top_n:
        yield "zarr checkpoints have no metrics in their names: --steps, or none for all"
    if args.foreign and (args.evaluate or args.item):
        yield "--evaluate and --item are for runs of jasr"
    if args.checkpoints and (args.top_n or args.steps):
        yield "--checkpoints names its members: no --top_n or --steps"
    if args.checkpoints and not (args.name or args.output):
        yield "--checkpoints needs --name or --output"
    if args.weights and args.equal:
        yield "--weights or --equal, not both"
    for flag, advice in UNUSED[args.foreign].items():
        if getattr(args, flag):
            yield f"--{flag} does nothing for {KINDS[args.foreign]}: {advice}"
    if ckpt and args.output.endswith(".nemo"):
        yield (
            f"--output={args.output} would be a .ckpt under another name; a .nemo is written with "
            "--input_nemo and --output_nemo"
        )
    if args.input_nemo and not os.path.isfile(args.input_nemo):
        yield f"--input_nemo={args.input_nemo}: there is no such file"
    if args.output_nemo and os.path.abspath(args.output) == os.path.abspath(args.output_nemo):
        yield "--output and --output_nemo name the same file"
    for flag in ("output", "output_nemo"):
        path = getattr(args, flag)
        folder = os.path.dirname(os.path.abspath(path))
        if args.foreign and path and os.path.lexists(path):
            yield f"--{flag}={path} exists and would be overwritten: choose another name"
        if ckpt and path and not os.path.isdir(folder):
            yield f"--{flag}={path}: there is no folder {folder}"


def foreign_kind(folder):
    """ "ckpt" or "zarr" for a folder of NeMo's checkpoints, "" for one of jasr's."""
    folder = pathlib.Path(folder)
    if any(folder.glob("*.ckpt")):
        return "ckpt"
    return "zarr" if any(folder.glob("*/*/.zarray")) else ""


def average_foreign(args):
    """Averages NeMo's .ckpt files or zarr directories into the files that `args` names."""
    from jasr import averaging
    from jasr.averaging import foreign

    if args.foreign == "zarr":
        chosen = foreign.find_directories(args.checkpoint_dir, args.steps)
        name = foreign.directory_name(args.name_prefix, args.steps)
        output = args.output or pathlib.Path(args.checkpoint_dir) / name
        how = "given" if args.weights else "equal"
        made = foreign.average_directories(chosen, output, args.weights, how=how)
        return show(output, made)
    chosen = foreign.find_files(args.checkpoint_dir, ema=args.ema)
    if args.top_n or args.steps:
        chosen = averaging.select(chosen, args.top_n, args.steps, args.metric, args.mode)
    weights, how = weigh(chosen, args)
    best = averaging.best_of(chosen, args.metric, args.mode)
    average = foreign.average_files(chosen, weights, how=how, best=best)
    if args.output:
        foreign.write_ckpt(args.output, average)
    if args.output_nemo:
        foreign.write_nemo(args.output_nemo, average.state, args.input_nemo)
    show(args.output_nemo or args.output, average.provenance)


def weigh(members, args):
    """(weights or None for equal ones, where they come from)."""
    from jasr import averaging

    if args.equal:
        return None, "equal"
    return averaging.weigh(members, args.weights, args.metric, args.mode)


def show(output, made):
    """Prints an average's members and weights."""
    what = f"{made['item']} of " if "item" in made else ""
    kind = "steps" if what else "checkpoints"
    print(f"{output}: {what}{len(made['members'])} {kind}, weights: {made['weights_from']}")
    for m in made["members"]:
        shown = "  ".join(f"{k} {v:.4f}" for k, v in m["metrics"].items())
        print(f"  {m['weight']:.4f} x step {m['step']:<8} {shown}  {m['path']}")


def choose(args):
    """(members, default name of the result) of the command line."""
    from jasr import averaging

    if args.checkpoints:
        return [averaging.member(p) for p in args.checkpoints], args.name
    members = averaging.find_members(args.checkpoint_dir)
    chosen = averaging.select(members, args.top_n, args.steps, args.metric, args.mode)
    name = f"top{args.top_n}" if args.top_n else "_".join(str(s) for s in args.steps)
    return chosen, args.name or name


@in_one_line
def main(argv=None):
    args = parse(argv)
    from jasr import averaging

    if args.foreign:
        average_foreign(args)
        return 0
    if args.evaluate:
        check_manifest(args.evaluate)
    members, name = choose(args)
    weights, how = weigh(members, args)
    output = pathlib.Path(args.output or f"{args.checkpoint_dir or '.'}/average-{name}")
    made = averaging.average_checkpoints(members, output, weights, args.item, how=how)
    show(output, made)
    if args.evaluate:
        compare(output, members, args.evaluate, made["item"])
    return 0


def check_manifest(manifest):
    """Raises DataError now, before the work, if nothing can be evaluated on it."""
    from jasr import data

    config = data.DataConfig(cache_audio=False)
    data.open_eval(config, manifest, data.AudioText(config, 16000, lambda text: [1]))


def compare(output, members, manifest, item):
    """Prints the error rates of the average and of each member on one data set."""
    from jasr import compilation_cache
    from jasr.recognition import report
    from jasr.systems import loading

    compilation_cache.enable()
    rows = [(f"step {m.step}", m.path, item) for m in members] + [("average", output, "")]
    print(f"{'':<16} {'WER %':>8} {'CER %':>8}   on {manifest}")
    for name, path, which in rows:
        with contextlib.redirect_stdout(sys.stderr):
            task, variables, meta = loading.load(path, item=which)
            got = report.evaluate(task, variables, (manifest,), meta=meta)
        print(f"{name:<16} {100 * got['wer']:8.2f} {100 * got['cer']:8.2f}", flush=True)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    sys.exit(main())
