"""Benchmarks against peers, side by side in one run.

    python -m experiments.benchmark ROW [options of the row]
    python -m experiments.benchmark all

ROW: features, lact, ctc, step, parakeet, transducer, load, checkpoint, loader.
Every row compares the outputs first, then times both sides interleaved with equal threads and
prints medians, quartiles and the ratio. `--help` after a row's name shows its options.
"""

import functools
import importlib
import sys

from experiments import huge_pages, options

ROWS = ("features", "lact", "ctc", "step", "parakeet", "transducer", "load", "checkpoint", "loader")


def main(argv=None):
    rows = {"all": every, **{name: functools.partial(run, name) for name in ROWS}}
    return options.dispatch(argv, __doc__, "benchmark row", rows)


def run(name, argv):
    """Exit status of a row."""
    return importlib.import_module(f"experiments.bench.{name}").main(argv) or 0


def every(argv):
    """The worst exit status of all rows; those after one that stops go on."""
    worst = 0
    for name in ROWS:
        try:
            worst = max(worst, run(name, argv))
        except SystemExit as e:
            if e.code:
                print(f"{name}: {e.code}", file=sys.stderr)
                worst = 1
    return worst


if __name__ == "__main__":
    huge_pages.use()
    sys.exit(main())
