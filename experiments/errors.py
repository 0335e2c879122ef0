"""What a user can mend is said in one line; JASR_TRACEBACK=1 shows where it was raised."""

import functools
import linecache
import os
import sys
import traceback
import warnings

OURS = ("jasr", "configs", "experiments", "__main__")
KINDS = (ValueError, FloatingPointError, ImportError, ModuleNotFoundError)


def in_one_line(command):
    """`command`, ending in a line on standard error and the status 1 where a user is to mend it.

    A fault of the program keeps its traceback.
    """

    @functools.wraps(command)
    def run(*args, **settings):
        # jasr's reports of checkpoints that are not used are logged as well
        warnings.filterwarnings("ignore", "checkpoint .* is not used", RuntimeWarning)
        warnings.formatwarning = lambda message, *_: f"note: {message}\n"
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
        print(f"error: {said(error)}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        sys.stderr.flush()


def said(error):
    """The message of an error; of a setting that ml_collections does not know, with its flag."""
    if error.args and isinstance(error.args[0], KeyError):
        error = error.args[0]  # the AttributeError of config.optim.lrr
    if not isinstance(error, KeyError) or not error.args:
        return str(error)
    key, _, hint = str(error.args[0]).partition("\n")
    key = key.strip("'")
    flags = (a.split("=")[0].lstrip("-") for a in sys.argv if a.startswith("--"))
    flag = next((f for f in flags if key in f.split(".")), key)
    return f"there is no setting {flag}. {hint}".rstrip()


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
