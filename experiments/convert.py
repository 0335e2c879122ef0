"""Converts models between NeMo, Hugging Face and jasr.

    python -m experiments.convert parakeet.nemo runs/parakeet      # also .ckpt, or an HF directory
    python -m experiments.convert runs/parakeet parakeet.nemo      # what NeMo restores
    python -m experiments.convert runs/parakeet parakeet_hf --to=hf

The source is whatever transcribe takes as --checkpoint. The result's format follows from its name
(.nemo; a directory ending in _hf) or from --to. Weights, tokenizer and settings come out as they
went in, bit for bit.
"""

import argparse
import os
import sys

from experiments.errors import in_one_line


@in_one_line
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help=".nemo, .ckpt, Hugging Face directory, run, step or average")
    parser.add_argument("target", help="x.nemo, a directory x_hf, or a run directory of jasr")
    parser.add_argument("--to", choices=("nemo", "hf", "jasr"), help="the target's format")
    parser.add_argument("--step", type=int, default=None, help="step of a run (newest)")
    parser.add_argument("--item", default="", help="params or ema (ema if there is one)")
    args = parser.parse_args(argv)
    from jasr import tasks
    from jasr.interop import hf_parakeet, nemo, originals

    kind = args.to or format_of(args.target)
    if os.path.exists(args.target) and (kind != "jasr" or os.path.isfile(args.target)):
        parser.error(f"{args.target} exists already")
    task, variables, meta = tasks.load(args.source, args.step, args.item)
    if kind == "jasr":
        tasks.save(args.target, meta, variables)
    else:
        model = originals.nemo_model(task, variables, meta)
        (nemo.write if kind == "nemo" else hf_parakeet.write)(args.target, model)
    print(f"{args.target}: {task.config.kind if hasattr(task.config, 'kind') else meta['task']}")
    return 0


def format_of(path):
    """The format that a target's name asks for."""
    if path.endswith(".nemo"):
        return "nemo"
    return "hf" if path.rstrip("/").endswith(("_hf", "-hf")) else "jasr"


if __name__ == "__main__":
    sys.exit(main())
