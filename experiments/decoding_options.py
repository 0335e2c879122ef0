"""Command-line options of how NeMo's models decode, shared by transcribe and evaluate."""

import math

MOST_CONTEXT = 100_000  # frames to either side: hours, more than any piece has


def add(parser):
    """Adds the options to an argparse parser."""
    add = parser.add_argument_group("NeMo's models").add_argument
    add(
        "--beam",
        type=int,
        default=None,
        help="hypotheses of a transducer's beam search; 1 = greedy",
    )
    add("--branch", choices=("transducer", "ctc"), default="", help="of a hybrid (transducer)")
    add(
        "--attention",
        choices=("full", "local"),
        default="",
        help="local: frames read --att_context alone, so that 10 minutes go in one piece",
    )
    add("--att_context", default="", help="frames left,right of local attention (128,128)")


def check_windows(parser, args):
    """Ends in the parser's error if --window, --overlap or --batch_seconds are no seconds."""
    values = args.window, args.overlap, args.batch_seconds
    if not all(map(math.isfinite, values)) or min(values) < 0 or args.batch_seconds == 0:
        parser.error("--window and --overlap are seconds from 0 on, --batch_seconds above 0")


def given(args):
    """The options as `recognizer.from_pretrained` and `tasks.load` take them.

    Raises:
      ValueError: an --att_context that is not two numbers, or a --beam below 1.
    """
    if args.beam is not None and args.beam < 1:
        raise ValueError(f"--beam={args.beam}: a number of hypotheses, at least 1")
    return {
        "beam": args.beam or 0,
        "branch": args.branch,
        "attention": args.attention,
        "att_context": context(args.att_context),
    }


def context(text):
    """(left, right) of "left,right"; () of ""."""
    if not text:
        return ()
    parts = text.split(",")
    numbers = [int(part) for part in parts if part.strip().isdecimal()]
    if len(parts) != 2 or len(numbers) != 2 or max(numbers) > MOST_CONTEXT:
        raise ValueError(
            f"--att_context={text}: give two numbers of frames up to {MOST_CONTEXT}, e.g. 128,128"
        )
    return tuple(numbers)
