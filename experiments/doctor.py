"""Check-ups of data, checkpoints and numerics.

    python -m experiments.doctor data MANIFEST [...]        every entry decoded, bad ones named
    python -m experiments.doctor checkpoint RUN             checksums, shapes, metrics of each step
    python -m experiments.doctor numerics --config=...      the first operation that gives NaN

`--help` after a name shows its options. The exit status is 0 only if nothing is wrong.
"""

import importlib
import sys

from experiments.errors import in_one_line

CHECKS = {
    "data": "experiments.checks.data",
    "checkpoint": "experiments.checks.checkpoint",
    "numerics": "experiments.checks.numerics",
}


@in_one_line
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if argv[0] not in CHECKS:
        print(f"no check {argv[0]!r}; choose from {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    return importlib.import_module(CHECKS[argv[0]]).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
