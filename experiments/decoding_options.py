"""Command-line options of how NeMo's models decode, shared by transcribe and evaluate."""


def add(parser):
    """Adds the options to an argparse parser."""
    add = parser.add_argument_group("NeMo's models").add_argument
    add("--beam", type=int, default=0, help="hypotheses of a transducer's beam search; 1 = greedy")
    add("--branch", choices=("transducer", "ctc"), default="", help="of a hybrid (transducer)")
    add(
        "--attention",
        choices=("full", "local"),
        default="",
        help="local: frames read --att_context alone, so that 10 minutes go in one piece",
    )
    add("--att_context", default="", help="frames left,right of local attention (128,128)")


def given(args):
    """The options as `recognizer.from_pretrained` and `tasks.load` take them.

    Raises:
      ValueError: an --att_context that is not two numbers, or a negative --beam.
    """
    if args.beam < 0:
        raise ValueError(f"--beam={args.beam}: a number of hypotheses, at least 1")
    return {
        "beam": args.beam,
        "branch": args.branch,
        "attention": args.attention,
        "att_context": context(args.att_context),
    }


def context(text):
    """(left, right) of "left,right"; () of ""."""
    if not text:
        return ()
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--att_context={text}: give two numbers of frames, e.g. 128,128")
    return tuple(int(part) for part in parts)
