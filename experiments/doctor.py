"""Check-ups of data, checkpoints and numerics.

    python -m experiments.doctor data MANIFEST [...]        every entry decoded, bad ones named
    python -m experiments.doctor checkpoint RUN             checksums, shapes, metrics of each step
    python -m experiments.doctor numerics --config=...      the first operation that gives NaN

`--help` after a name shows its options. The exit status is 0 only if nothing is wrong.
"""

import functools
import importlib
import sys

from experiments import options
from experiments.errors import in_one_line


def check(name, argv):
    return importlib.import_module(f"experiments.checks.{name}").main(argv)


@in_one_line
def main(argv=None):
    checks = {name: functools.partial(check, name) for name in ("data", "checkpoint", "numerics")}
    return options.dispatch(argv, __doc__, "check", checks)


if __name__ == "__main__":
    sys.exit(main())
