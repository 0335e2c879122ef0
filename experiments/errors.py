"""What a user can mend is said in one line; JASR_TRACEBACK=1 shows where it was raised."""

import functools
import linecache
import os
import sys
import traceback

OURS = ("jasr", "configs", "experiments", "__main__")
KINDS = (ValueError, FloatingPointError, ImportError, ModuleNotFoundError)


def in_one_line(command):
    """`command`, ending in a line on standard error and the status 1 where a user is to mend it.

    A fault of the program keeps its traceback.
    """

    @functools.wraps(command)
    def run(*args, **settings):
        try:
            return command(*args, **settings)
        except Exception as e:
            if not mendable(e):
                raise
            report(e)
            return 1

    return run


def report(error):
    """Says an error on standard error: in one line, or with the traceback of a fault."""
    if mendable(error):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        sys.stderr.flush()


def mendable(error):
    """Whether it is about files, a class of jasr's own, or raised where settings are read.

    Nothing is with JASR_TRACEBACK=1.
    """
    if os.environ.get("JASR_TRACEBACK"):
        return False
    if isinstance(error, OSError) or type(error).__module__.startswith("jasr."):
        return True
    place = error.__traceback__
    while place.tb_next:
        place = place.tb_next
    frame = place.tb_frame
    package = frame.f_globals.get("__name__", "").split(".")[0]
    line = linecache.getline(frame.f_code.co_filename, place.tb_lineno, frame.f_globals)
    raised = line.lstrip().startswith("raise ")  # and not met in code without a Python frame
    return package == "ml_collections" or package in OURS and raised and type(error) in KINDS
