"""Interleaved timing of rival implementations, and the lines that report it."""

import os
import platform
import statistics
import time


def threads():
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def interleave(thunks, rounds=7, warmup=1):
    """Seconds of every call, `{name: [s, ...]}`: A B A B ..., the order reversed every other round.

    A thunk must return only when its work is done (block_until_ready / synchronize inside).
    """
    for _ in range(warmup):
        for thunk in thunks.values():
            thunk()
    times = {name: [] for name in thunks}
    for i in range(rounds):
        names = list(thunks) if i % 2 == 0 else list(thunks)[::-1]
        for name in names:
            start = time.perf_counter()
            thunks[name]()
            times[name].append(time.perf_counter() - start)
    return times


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
