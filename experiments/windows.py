"""What transcribe and evaluate ask of the windows that recordings are cut into."""

import math


def check(parser, args):
    """Ends in the parser's error if --window, --overlap or --batch_seconds are no seconds."""
    values = args.window, args.overlap, args.batch_seconds
    if not all(map(math.isfinite, values)) or min(values) < 0 or args.batch_seconds == 0:
        parser.error("--window and --overlap are seconds from 0 on, --batch_seconds above 0")
