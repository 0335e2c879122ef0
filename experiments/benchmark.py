"""Benchmarks against peers, side by side in one run.

    python -m experiments.benchmark ROW [options of the row]
    python -m experiments.benchmark all

ROW: features, lact, ctc, step, parakeet, transducer, load, checkpoint, loader.
Every row compares the outputs first, then times both sides interleaved with equal threads and
prints medians, quartiles and the ratio. `--help` after a row's name shows its options.
"""

import importlib
import sys

from experiments import huge_pages

ROWS = ("features", "lact", "ctc", "step", "parakeet", "transducer", "load", "checkpoint", "loader")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    row, rest = argv[0], argv[1:]
    if row == "all":
        return max(attempt([name, *rest]) for name in ROWS)
    if row not in ROWS:
        print(f"no benchmark row {row!r}; choose from all, {', '.join(ROWS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"experiments.bench.{row}").main(rest) or 0


def attempt(argv):
    """Exit status of a row; the rows after one that stops go on."""
    try:
        return main(argv)
    except SystemExit as e:
        if e.code:
            print(f"{argv[0]}: {e.code}", file=sys.stderr)
        return 1 if e.code else 0


if __name__ == "__main__":
    huge_pages.use()
    sys.exit(main())
