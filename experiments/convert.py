"""Converts models between NeMo, Hugging Face and jasr.

    python -m experiments.convert parakeet.nemo runs/parakeet      # also .ckpt, or an HF directory
    python -m experiments.convert runs/parakeet parakeet.nemo      # what NeMo restores
    python -m experiments.convert runs/parakeet parakeet_hf --to=hf

The source is whatever transcribe takes as --checkpoint. The result's format follows from its name
(.nemo; a directory ending in _hf) or from --to. Float32 weights, the tokenizer and settings come
out as they went in, bit for bit; weights of another precision become float32, which a note says.

Weights without config or tokenizer (most .ckpt) take those of --like=model.nemo. Hugging Face has
no hybrids, of which --branch takes one head, and not the front end of NeMo before 2.5, which
--modern_front_end replaces.
"""

import argparse
import os
import sys

from experiments.errors import in_one_line


@in_one_line
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help=".nemo, .ckpt, Hugging Face directory, run, step or average")
    parser.add_argument("target", help="x.nemo, a directory x_hf, or a run directory of jasr")
    parser.add_argument("--to", choices=("nemo", "hf", "jasr"), help="the target's format")
    parser.add_argument("--like", default="", help=".nemo that the weights of a .ckpt belong to")
    parser.add_argument(
        "--branch", choices=("transducer", "ctc"), default="", help="export one head of a hybrid"
    )
    parser.add_argument(
        "--modern_front_end",
        action="store_true",
        help="export a model of NeMo before 2.5 with the front end and subsampling of 2.5",
    )
    parser.add_argument("--step", type=int, default=None, help="step of a run (newest)")
    parser.add_argument("--item", default="", help="params or ema (ema if there is one)")
    args = parser.parse_args(argv)
    from jasr.systems import loading, originals
    from jasr.systems.fastconformer import hf_parakeet, nemo

    kind = args.to or format_of(args.target)
    if os.path.exists(args.target) and (kind != "jasr" or os.path.isfile(args.target)):
        parser.error(f"{args.target} exists already")
    if kind == "jasr" and not is_free(args.target):
        parser.error(f"{args.target} holds files that are no run; name a new directory")
    if kind == "jasr" and (args.branch or args.modern_front_end):
        parser.error("--branch and --modern_front_end are for .nemo and Hugging Face targets")
    task, variables, meta = loading.load(args.source, args.step, args.item, like=args.like)
    said = getattr(task.config, "kind", meta["task"])
    if kind == "jasr":
        loading.save(args.target, meta, variables)
    else:
        model = originals.nemo_model(task, variables, meta)
        model, changes = originals.exported(model, args.branch, args.modern_front_end)
        (nemo.write if kind == "nemo" else hf_parakeet.write)(args.target, model)
        said = model.kind
        for change in changes:
            print(f"note: {change}", file=sys.stderr)
    print(f"{args.target}: {said}")
    return 0


def is_free(target):
    """Whether a run can be made at `target`: nothing is there, or a run (which is not replaced)."""
    there = os.listdir(target) if os.path.isdir(target) else []
    return not there or "checkpoints" in there


def format_of(path):
    """The format that a target's name asks for."""
    if path.endswith(".nemo"):
        return "nemo"
    return "hf" if path.rstrip("/").endswith(("_hf", "-hf")) else "jasr"


if __name__ == "__main__":
    sys.exit(main())
