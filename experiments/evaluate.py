"""Word error rate of a checkpoint on a manifest.

    python -m experiments.evaluate --checkpoint=runs/an4 --manifest=valid.jsonl --output=eval.json

Prints WER and CER with 95 % intervals (bootstrap over utterances), WER by duration, speed with
compiling apart, fast-weight updates an utterance, how many were seen in several windows, and last
`WER x.xx % on N utterances`. --output holds all of it and every utterance; --baseline compares with
such a file of another model on the same utterances (paired bootstrap).
"""

import contextlib
import json
import pathlib
import sys

from experiments import huge_pages, options
from experiments.errors import in_one_line
from jasr.systems import catalogue


@in_one_line
def main(argv=None):
    args = parse(argv)
    with contextlib.redirect_stdout(sys.stderr):
        printed = evaluate(args)
    print(*printed, sep="\n", flush=True)
    return 0


def parse(argv):
    parser = options.parser("evaluate", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--manifest", required=True, action="append", help="manifest, CutSet or Shar; repeatable")
    add("--output", default="", help="JSON report with every utterance")
    add("--predictions", default="", help="JSON lines: id, ref, hyp")
    add("--baseline", default="", help="an earlier --output to compare with")
    add("--normalisation", default="", help="none, lower or whisper_english (the tokenizer's)")
    add("--label", default="", help="what the utterances are, for the last line")
    add("--limit", type=int, default=0, help="score the first N utterances only")
    options.add_recogniser(parser)
    args = parser.parse_args(argv)
    args.windows = options.windows(parser, args)
    if args.limit < 0:
        parser.error(f"--limit={args.limit}: a number of utterances; 0 = all")
    return args


def evaluate(args):
    """Lines for standard output."""
    from jasr import compilation_cache
    from jasr.recognition import report as score
    from jasr.systems import loading

    compilation_cache.enable()
    for path in filter(None, (args.output, args.predictions)):  # now, not after the work
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    baseline = read_report(args.baseline) if args.baseline else None
    given = catalogue.given_options(args, "transcribe")
    task, variables, meta = loading.load(
        args.checkpoint, args.step, args.item, options=given, like=args.like
    )
    report = score.evaluate(
        task,
        variables,
        tuple(args.manifest),
        normalisation=args.normalisation,
        meta=meta,
        limit=args.limit,
        **args.windows,
    )
    difference = score.compare(report, baseline) if baseline else None
    for line in report["left_out"]:
        print(f"left out: {line}", file=sys.stderr)
    about = {
        "checkpoint": args.checkpoint,
        "step": meta.get("step"),
        "item": args.item or "default",
        "manifest": args.manifest,
        **given,
    }
    if difference:
        about["baseline"] = {"file": args.baseline, **difference}
    if args.output:
        score.dump({**about, **report}, args.output)
    if args.predictions:
        with open(args.predictions, "w", encoding="utf-8") as f:
            for u in report["utterances"]:
                row = {k: u[k] for k in ("id", "ref", "hyp")}
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
    printed = [*score.lines(report)]
    if difference:
        printed.append(
            f"against {args.baseline}: {100 * difference['difference']:+.2f} points "
            f"[{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}], "
            f"better in {100 * difference['p_better']:.0f} % of the draws"
        )
    return [*printed, score.last_line(report, args.label)]


def read_report(path):
    """An earlier --output.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        if "utterances" in found:
            return found
    except ValueError:
        pass
    raise ValueError(f"--baseline {path} is not a report that --output wrote")


if __name__ == "__main__":
    huge_pages.use()
    sys.exit(main())
