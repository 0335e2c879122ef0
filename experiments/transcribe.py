"""Transcribes recordings: files and directories of WAV, FLAC, OGG or MP3, of any length.

    python -m experiments.transcribe --checkpoint=runs/an4 a.wav b.flac dir/ --format=srt
    python -m experiments.transcribe --checkpoint=parakeet.nemo long.mp3 --attention=local

Transcripts go to standard output in the order of the inputs (or, with --output_dir, to one file
each), everything else to standard error; several recordings as srt or vtt give one file each, in
the current directory unless --output_dir names another. A recording that cannot be used is reported
there (and, in JSON, as an object with "error"); the others go on and the exit status is 1.
"""

import contextlib
import os
import pathlib
import sys
import time

from experiments import huge_pages, options
from experiments.errors import in_one_line
from jasr.recognition.formats import FORMATS, render
from jasr.systems import catalogue


@in_one_line
def main(argv=None):
    args = parse(argv)
    out = sys.stdout
    if hasattr(out, "reconfigure"):
        out.reconfigure(encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints is not a transcript
        try:
            return transcribe(args, out)
        except BrokenPipeError:  # the reader has left: | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
            return 1


def parse(argv):
    parser = options.parser("transcribe", __doc__, allow_abbrev=False)
    parser.add_argument("inputs", nargs="+", metavar="PATH", help="recording, or directory of them")
    parser.add_argument("--format", choices=FORMATS, default="txt")
    parser.add_argument("--output_dir", default="", help="write one file a recording there")
    parser.add_argument(
        "--timestamps",
        metavar="NAME",
        default="",
        help="in JSON, times of this name that the model has besides jasr's, as `timestamp`; a "
        "name that it does not have lists those it has",
    )
    options.add_recogniser(parser)
    args = parser.parse_intermixed_args(argv)
    args.windows = options.windows(parser, args)
    if args.timestamps and args.format != "json":
        parser.error("--timestamps are written in JSON only: add --format=json")
    return args


def transcribe(args, out):
    """Runs the command; the exit status."""
    from jasr.metrics import progress
    from jasr.recognition.recognizer import find_recordings, from_pretrained

    found, problems = find_recordings(args.inputs)
    for problem in problems:
        say(f"error: {problem}")
    if args.format in ("srt", "vtt") and len(found) > 1 and not args.output_dir:
        args.output_dir = "."
        say(f"{len(found)} recordings: one .{args.format} file each in the current directory")
    if not found:
        return 1
    model = from_pretrained(
        args.checkpoint,
        step=args.step,
        item=args.item,
        like=args.like,
        timestamps=args.timestamps,
        **args.windows,
        **catalogue.given_options(args, "transcribe"),
    )
    start, failed, missing, windows = time.perf_counter(), len(problems), 0.0, 0
    results = progress(model.each(path for path, _ in found), total=len(found))
    for (path, name), result in zip(found, results, strict=True):
        failed += report(path, result)
        missing += sum(b - a for a, b in result["coverage"]["uncovered"])
        windows += result["coverage"]["windows"]
        if "error" in result and args.format != "json":
            continue
        label = name if args.format == "ctm" else str(path) if len(found) > 1 else ""
        write(render(result, args.format, label), name, args, out)
    wall = time.perf_counter() - start
    say(
        f"{len(found)} recordings, {model.audio_seconds:.1f} s of audio in {wall:.1f} s, "
        f"{model.compile_seconds:.1f} s of them compiling; {failed} failed; "
        f"{f'{missing:.2f} s' if missing else 'nothing'} left undecoded by {windows} windows"
    )
    return 1 if failed else 0


def report(path, result):
    """Prints what was wrong with a recording; 1 if it could not be transcribed, else 0."""
    if "error" in result:
        say(f"error: {result['error']}")
        return 1
    for warning in result["warnings"]:
        say(f"warning: {path}: {warning}")
    return 0


def write(text, name, args, out):
    """Prints a transcript, or writes it under --output_dir."""
    if not args.output_dir:
        out.write(text)
        out.flush()
        return
    path = pathlib.Path(args.output_dir) / f"{name}.{args.format}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def say(line):
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    huge_pages.use()
    sys.exit(main())
