"""Converts models between jasr and the formats they come from: NeMo, Hugging Face, LaCT ASR.

    python -m experiments.convert parakeet.nemo runs/parakeet      # also .ckpt, or an HF directory
    python -m experiments.convert runs/parakeet parakeet.nemo      # what NeMo restores
    python -m experiments.convert runs/parakeet parakeet_hf --to=hf
    python -m experiments.convert runs/lact theirs --to=lact       # what the original loads

The source is whatever transcribe takes as --checkpoint. The result's format follows from its name
(.nemo; a directory ending in _hf or _lact) or from --to. Float32 weights, the tokenizer and
settings come out as they went in, bit for bit; weights of another precision become float32, which
a note says.

Weights without config or tokenizer (most .ckpt) take those of --like=model.nemo. Hugging Face has
no hybrids, of which --branch takes one head, and not the front end of NeMo before 2.5, which
--modern_front_end replaces.
"""

import os
import sys

from experiments import options
from experiments.errors import in_one_line
from jasr.systems import catalogue


@in_one_line
def main(argv=None):
    parser = options.parser("convert", __doc__)
    parser.add_argument("source", help=".nemo, .ckpt, Hugging Face directory, run, step or average")
    parser.add_argument("target", help="x.nemo, a directory x_hf, or a run directory of jasr")
    names = dict.fromkeys(name for system in catalogue.every() for name in system.originals)
    parser.add_argument("--to", choices=(*names, "jasr"), help="the target's format")
    options.add_source(parser)
    catalogue.add_options(parser, "convert")
    args = parser.parse_args(argv)
    from jasr import tree
    from jasr.systems import loading, source

    kind = args.to or source.format_of(args.target) or "jasr"
    given = catalogue.given_options(args, "convert")
    if os.path.exists(args.target) and (kind != "jasr" or os.path.isfile(args.target)):
        parser.error(f"{args.target} exists already")
    if kind == "jasr" and not is_free(args.target):
        parser.error(f"{args.target} holds files that are no run; name a new directory")
    if kind == "jasr" and given:
        parser.error(f"--{' and --'.join(given)}: for targets of other formats than jasr's")
    meta, leaves = source.opened(args.source, args.step, args.item, args.like)
    loading.check_meta(args.source, meta)
    if kind == "jasr":
        loading.save(args.target, meta, tree.unflatten(leaves))
        said = [meta["config"]["model"].get("kind", meta["config"]["task"])]
    else:
        said = source.export(kind, args.target, meta, leaves, given)
    for change in said[1:]:
        print(f"note: {change}", file=sys.stderr)
    print(f"{args.target}: {said[0]}")
    return 0


def is_free(target):
    """Whether a run can be made at `target`: nothing is there, or a run (which is not replaced)."""
    there = os.listdir(target) if os.path.isdir(target) else []
    return not there or "checkpoints" in there


if __name__ == "__main__":
    sys.exit(main())
