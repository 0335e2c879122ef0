"""The directory of a run belongs to one process; a signal asks that process to save and stop.

The lock is `flock` on `<workdir>/run.lock`: the kernel gives it to exactly one starter and frees
it when the holder dies, however it dies. The file names the holder; it stays when the lock is
released, since removing it would open a race. On NFS `flock` is as good as the server's lock
service (NFSv4: good). A file system without `flock` gets numbered files instead, taken over when
their holder is provably gone (same host, and no such process or another boot).
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time

LOCK = "run.lock"
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


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
        os.close(fd)
        if e.errno not in _NO_FLOCK:
            raise WorkdirBusy(_busy(workdir, _holder(path))) from None
        with _numbered_file(workdir):
            yield
        return
    # A forked child shares the lock and would keep it after our death: it lets go at once.
    held = [fd]
    os.register_at_fork(after_in_child=lambda: [os.close(held.pop()) for _ in held[:]])
    try:
        _write(fd, _me())
        yield
    finally:
        if held:
            _write(fd, None)
            os.close(held.pop())


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


@contextlib.contextmanager
def _numbered_file(workdir):
    """The lock without flock: whoever makes the next file `run.lock.<n>` holds the directory.

    A file appears with its holder's name in it (hard link) and the highest number always stays,
    so that of several starters that find the last holder gone exactly one makes the next.
    """
    mine = workdir / f"{LOCK}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    mine.write_text(json.dumps(_me()))
    try:
        while True:
            found = [
                int(n)
                for p in workdir.glob(f"{LOCK}.*")
                if (n := p.suffix[1:]).isdecimal() and p.name == f"{LOCK}.{n}"
            ]
            last = max(found, default=0)
            holder = _holder(workdir / f"{LOCK}.{last}") if found else {}
            if holder and not holder.get("released") and not _gone(holder):
                raise WorkdirBusy(
                    _busy(workdir, holder)
                    + f" If it is surely gone, remove {workdir / LOCK}.{last}."
                )
            path = workdir / f"{LOCK}.{last + 1}"
            try:
                os.link(mine, path)
                break
            except FileExistsError:
                continue
        for n in found:
            (workdir / f"{LOCK}.{n}").unlink(missing_ok=True)
    finally:
        mine.unlink()
    try:
        yield
    finally:
        released = path.with_suffix(".released")
        released.write_text(json.dumps(_me() | {"released": True}))
        os.replace(released, path)


def _me():
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot(),
        "born": _born(os.getpid()),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _boot():
    """An id of this start of the machine: pids mean nothing across a reboot."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _born(pid):
    """When a process started, in clock ticks since boot: pids are used again."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return text.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _gone(holder):
    """Whether the holder is provably not running; another host's processes cannot be seen."""
    if holder.get("host") != socket.gethostname() or "pid" not in holder:
        return False
    if holder.get("boot") != _boot():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return bool(holder.get("born")) and holder["born"] != _born(holder["pid"])


def _holder(path):
    for _ in range(20):  # the winner of a race needs a moment to write its name
        try:
            holder = json.loads(path.read_text())
            if holder:
                return holder
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    return {}


def _busy(workdir, holder):
    if not holder:
        return f"{workdir} is in use by another process that has just started."
    text = (
        f"{workdir} is in use by process {holder.get('pid')} on {holder.get('host')}, started "
        f"{holder.get('started')}. Wait for it, stop it, or choose another --workdir."
    )
    if _gone(holder):
        text += " (That process is gone, but one that it started still holds the lock.)"
    return text


def _write(fd, record):
    data = b"" if record is None else json.dumps(record).encode()
    os.lseek(fd, 0, os.SEEK_SET)
    os.truncate(fd, 0)
    os.write(fd, data)
    os.fsync(fd)
