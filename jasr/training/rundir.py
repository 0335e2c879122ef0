"""The directory of a run belongs to one process; a signal asks that process to save and stop.

The lock is `flock` on `<workdir>/run.lock`: the kernel gives it to exactly one starter and frees
it when the holder dies, however it dies. The file names the holder; it stays when the lock is
released, since removing it would open a race. On NFS `flock` is as good as the server's lock
service (NFSv4: good). On a file system without `flock` the run starts with a warning, unless the
file names a living process of this host; that does not tell two simultaneous starters apart.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import signal
import socket
import sys
import time

LOCK = "run.lock"
_HOLDER = {"pid": int, "host": str, "started": str}
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
log = logging.getLogger("jasr.train")


class WorkdirBusy(RuntimeError):
    """Another process works in this run directory."""


@contextlib.contextmanager
def lock(workdir):
    """Holds the run directory (made if needed) for this process alone.

    Raises:
      WorkdirBusy: another process holds it; the message names its pid, host and start.
      OSError: the directory cannot be made or written to.
    """
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in _NO_FLOCK or _runs_here(_read(path)):
            os.close(fd)
            raise WorkdirBusy(_busy(path)) from None
        log.warning("%s has no file locks: start no second process there meanwhile", workdir)
    # A forked child shares the lock and would keep it after our death: it lets go at once.
    held = [fd]
    os.register_at_fork(after_in_child=lambda: [os.close(held.pop()) for _ in held[:]])
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    me = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    try:
        _write(fd, json.dumps(me))
        yield
    finally:
        if held:
            _write(fd, "")
            os.close(held.pop())


def _write(fd, text):
    os.truncate(fd, 0)
    os.pwrite(fd, text.encode(), 0)
    os.fsync(fd)


def _read(path):
    """What the holder has written of itself, {} if nothing that can be read."""
    try:
        found = json.loads(path.read_text())
        return {name: kind(found[name]) for name, kind in _HOLDER.items()}
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return {}


def _runs_here(holder):
    """Whether another process of this host has the holder's number."""
    if holder.get("host") != socket.gethostname() or holder["pid"] in (0, os.getpid()):
        return False
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _busy(path):
    for _ in range(20):  # the winner of a race needs a moment to write its name
        if holder := _read(path):
            return (
                f"{path.parent} is in use by process {holder['pid']} on {holder['host']}, started "
                f"{holder['started']}. Wait for it, stop it, or choose another --workdir. (If it "
                "is gone, a process that it started still holds the lock.)"
            )
        time.sleep(0.02)
    return f"{path.parent} is in use by another process that has just started."


class StopFlag:
    """True when called after the first SIGTERM or SIGINT; a second SIGINT raises at once.

        with StopFlag() as stop:
            while not stop(): ...

    Outside the main thread, where Python allows no handlers, it is always False.
    """

    def __init__(self):
        self._asked = 0
        self._before = {}

    def __call__(self):
        return self._asked > 0

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                break
        return self

    def __exit__(self, *exc):
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before = {}

    def _handle(self, number, frame):
        self._asked += 1
        name = signal.Signals(number).name
        if number == signal.SIGINT and self._asked > 1:
            raise KeyboardInterrupt
        # os.write: logging may hold the lock that the interrupted code holds.
        text = f"\n{name}: the run saves a checkpoint and stops; Ctrl-C again stops at once\n"
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
