"""What the command lines of several commands have in common."""

import argparse
import math
import sys


def parser(command, about, **settings):
    """The argparse parser of `python -m experiments.COMMAND`; `about` is its help as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m experiments.{command}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **settings,
    )


def dispatch(argv, about, what, commands):
    """Runs commands[argv[0]](argv[1:]); its status, or 2 where no `what` has that name.

    argv: None = that of the process. Without a name the help `about` is shown.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(about)
        return 0
    if name not in commands:
        print(f"no {what} {name!r}; choose from {', '.join(commands)}", file=sys.stderr)
        return 2
    return commands[name](rest) or 0


def add_source(parser):
    """Adds the options on what a source of weights holds."""
    parser.add_argument("--like", default="", help=".nemo that the weights of a .ckpt belong to")
    parser.add_argument("--step", type=int, default=None, help="step of the run (newest)")
    parser.add_argument("--item", default="", help="params or ema (ema if there is one)")


def add_recogniser(parser):
    """Adds the options on a model that transcribes, and on the windows it hears recordings in."""
    from jasr.systems import catalogue

    parser.add_argument("--checkpoint", required=True, help="run, step, average, .nemo ...")
    add_source(parser)
    parser.add_argument("--window", type=float, default=0.0, help="s seen at once (as trained)")
    parser.add_argument("--overlap", type=float, default=0.0, help="s two windows share (4 or 16)")
    parser.add_argument("--batch_seconds", type=float, default=64.0, help="s of audio in one batch")
    catalogue.add_options(parser, "transcribe")


def windows(parser, args):
    """{"window", "overlap", "batch_seconds"} in seconds; ends in the parser's error if they are
    none."""
    found = {name: getattr(args, name) for name in ("window", "overlap", "batch_seconds")}
    finite = all(map(math.isfinite, found.values()))
    if not finite or min(found.values()) < 0 or args.batch_seconds == 0:
        parser.error("--window and --overlap are seconds from 0 on, --batch_seconds above 0")
    return found
