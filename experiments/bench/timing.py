"""Interleaved timing of rival implementations, and the lines that report it."""

import os
import platform
import statistics
import subprocess
import sys
import time


def threads():
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


SETTLE = 0.4  # seconds: OpenMP's idle threads keep a core busy for 0.2 after each call


def interleave(thunks, rounds=7, warmup=1, apart=False):
    """Seconds of every call, `{name: [s, ...]}`: A B A B ..., the order reversed every other round.

    A thunk must return only when its work is done (block_until_ready / synchronize inside).
    `apart`: calls that are not timed, for SETTLE seconds, precede every one that is.
    """
    for _ in range(warmup):
        for thunk in thunks.values():
            thunk()
    times = {name: [] for name in thunks}
    for i in range(rounds):
        names = list(thunks) if i % 2 == 0 else list(thunks)[::-1]
        for name in names:
            begin = time.perf_counter()
            while apart and time.perf_counter() < begin + SETTLE:
                thunks[name]()
            start = time.perf_counter()
            thunks[name]()
            times[name].append(time.perf_counter() - start)
    return times


def serve(call):
    """One call, then one for every line of standard input; "done" on standard output after each."""
    call()
    print("done", flush=True)
    for _ in sys.stdin:
        call()
        print("done", flush=True)


class Worker:
    """A process whose command line ends in `serve`; a call returns when it has done one more."""

    def __init__(self, line):
        self.line = line
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait(self):
        if self.process.stdout.readline().strip() != "done":
            raise SystemExit(f"{' '.join(self.line)} failed")

    def __call__(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def in_turns(lines, rounds, ready=None):
    """What `interleave` gives for the `serve` processes of command lines {name: line}.

    ready: called when every process has done its first call, before any is timed.

    For rivals that disturb one another in one process. A turn begins with calls that are not
    timed: until the other's idle threads have stopped spinning, and until memory is back that a
    virtual machine gave to its host in the meantime. In training a step follows another, too.
    """
    workers = {name: Worker(line) for name, line in lines.items()}
    try:
        for worker in workers.values():
            worker.wait()
        if ready is not None:
            ready()
        return interleave(workers, rounds, apart=True)
    finally:
        for worker in workers.values():
            worker.close()


def quartiles(values):
    """(lower quartile, median, upper quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    q = statistics.quantiles(values, n=4, method="inclusive")
    return q[0], q[1], q[2]


def report(title, times, *, ours, peer=None, extra=()):
    """Prints medians with quartiles and the median of the per-round ratios peer / ours.

    Returns the ratio (above 1 = ours is faster), or None without a peer.
    """
    print(f"## {title}")
    for name, values in times.items():
        low, mid, high = quartiles(values)
        print(f"  {name:<28} {1e3 * mid:10.2f} ms   [{1e3 * low:.2f}, {1e3 * high:.2f}]")
    for line in extra:
        print(f"  {line}")
    if peer is None:
        return None
    ratios = [p / o for p, o in zip(times[peer], times[ours], strict=True)]
    low, mid, high = quartiles(ratios)
    print(f"  {ours} is {mid:.2f}x as fast as {peer}   [{low:.2f}, {high:.2f}]")
    return mid


def machine():
    """One line about the machine: cores, load, versions."""
    import jax

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    device = jax.devices()[0]
    return (
        f"{threads()} cores, load {load:.1f}, {device.platform} {device.device_kind}, "
        f"python {platform.python_version()}, jax {jax.__version__}"
    )
