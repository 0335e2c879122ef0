"""Check-up of checkpoints: what there is, what it is worth, and whether every byte is as written.

    python -m experiments.doctor checkpoint runs/an4 [more ...] [--tree] [--fast]

Prints for every step its size, its trees with their numbers of parameters, and its metrics; names
every file that is missing, truncated or changed. The exit status is 0 only if all steps are whole.
"""

import collections
import math
import pathlib
import sys

from experiments import options
from jasr.checkpoint.files import CheckpointError, find_steps, is_step, load_metrics, verify

UNFINISHED = (".orbax-checkpoint-tmp", ".jasr-deleting")  # directories of saves and deletions


def main(argv=None):
    parser = options.parser("doctor checkpoint", __doc__)
    parser.add_argument("path", nargs="+", help="a run, a directory of steps, or a step")
    parser.add_argument("--tree", action="store_true", help="list every parameter of the newest")
    parser.add_argument("--fast", action="store_true", help="names and sizes only, no checksums")
    args = parser.parse_args(argv)
    bad = 0
    for path in args.path:
        try:
            bad += check(pathlib.Path(path), checksums=not args.fast, show_tree=args.tree)
        except CheckpointError as e:
            print(f"error: {e}", file=sys.stderr)
            bad += 1
    return 1 if bad else 0


def check(path, checksums=True, show_tree=False):
    """Prints the report of a run, a directory of steps or one step; the number of damaged steps."""
    if is_step(path):
        steps = [path]
    else:
        steps = list(find_steps(path).values())
        steps += [d for d in sorted(path.iterdir()) if d.is_dir() and is_step(d)]
        for d in sorted(steps[0].parent.glob("*")):
            if d.is_dir() and any(mark in d.name for mark in UNFINISHED):
                print(f"{d}: a save or deletion under way, or what is left of one that was cut off")
    damaged = sum(not report(directory, checksums) for directory in dict.fromkeys(steps))
    if show_tree and not damaged:
        for path, kind in sorted(kinds(steps[-1]).items()):
            print(f"  {path:<60} {str(kind.dtype):<9} {tuple(kind.shape)}")
    whole = len(steps) - damaged
    print(f"{path}: {whole} whole, {damaged} damaged" + ("" if checksums else " (sizes only)"))
    return damaged


def report(directory, checksums=True):
    """Prints what is known about a step directory; whether it is whole."""
    size = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
    shown = "  ".join(f"{k} {v:.4f}" for k, v in load_metrics(directory).items())
    damage = verify(directory, checksums=checksums)
    print(f"{directory}: {'DAMAGED' if damage else 'whole'}, {size / 1e6:.1f} MB  {shown}")
    for line in damage:
        print(f"  {line}")
    if damage:
        return False
    counts = collections.defaultdict(list)
    for path, kind in kinds(directory).items():
        counts[path.split("/")[0]].append(math.prod(kind.shape))
    for item, numbers in counts.items():
        print(f"  {item:<12} {sum(numbers):>14,} numbers in {len(numbers)} arrays")
    return True


def kinds(directory):
    """{item/path: what has .shape and .dtype} of every array of a step; reads no data."""
    from jasr import checkpoint
    from jasr.checkpoint import read

    return {
        f"{item}/{path}": kind
        for item in checkpoint.items(directory)
        for path, kind in read.arrays(directory / item).items()
    }
