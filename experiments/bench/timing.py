"""Rivals in turns, each in a process of its own, and the lines that report it.

A side of a row is a function whose result is a call without arguments: what is timed. `served` and
`result` run one in a new process, with its arguments as JSON (an argparse.Namespace may be one).
"""

import argparse
import contextlib
import ctypes
import functools
import importlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

from experiments import options

SETTLE = 0.4  # seconds: OpenMP's idle threads keep a core busy for 0.2 after each call
RIVAL = pathlib.Path(__file__).resolve().parents[2] / "third_party" / "nemo" / "rival.py"


def threads():
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parser(row, about, **numbers):
    """The argparse parser of a row with the options {name: default number}."""
    made = options.parser(f"benchmark {row}", about)
    for name, default in numbers.items():
        made.add_argument(f"--{name}", type=type(default), default=default)
    return made


# ---- in turns ------------------------------------------------------------------------------------


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


def in_turns(lines, rounds, ready=None):
    """What `interleave` gives for the `serve` processes of command lines {name: line}.

    ready: called when every process has done its first call, before any is timed.

    For rivals that disturb one another in one process. A turn begins with calls that are not
    timed: until the other's idle threads have stopped spinning, and until memory is back that a
    virtual machine gave to its host in the meantime. In training a step follows another, too.
    """
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as started:
        processes = {
            n: started.enter_context(subprocess.Popen(x, **pipes)) for n, x in lines.items()
        }

        def wait(name):
            if processes[name].stdout.readline().strip() != "done":
                raise SystemExit(f"{' '.join(lines[name])} failed")

        def call(name):
            processes[name].stdin.write("\n")
            processes[name].stdin.flush()
            wait(name)

        for name in lines:
            wait(name)
        if ready is not None:
            ready()
        return interleave({n: functools.partial(call, n) for n in lines}, rounds, apart=True)


# ---- processes -----------------------------------------------------------------------------------


def served(side, *values):
    """The command line of a process that serves the call side(*values)."""
    return _line("serve", side, values)


def result(function, *values):
    """What function(*values) returns in a new process, through JSON."""
    return _run(_line("result", function, values))


def nemo(args, what, folder):
    """{"NeMo": command line} where --nemo_python was given, else {}.

    NeMo's side of `what` on folder/model.nemo and folder/inputs.npz; results go to folder/NeMo.npz.
    """
    if not args.nemo_python:
        return {}
    line = [args.nemo_python, str(RIVAL), what, f"--model={folder}/model.nemo"]
    line += [f"--output={folder}/NeMo.npz", f"--threads={threads()}"]
    given = pathlib.Path(folder) / "inputs.npz"
    return {"NeMo": [*line, f"--input={given}"] if given.exists() else line}


def peak_memory(sides, values, small):
    """The line of a report on the memory of {"jasr": side, peer: side}; none where Linux is silent.

    It is by how much the resident set grows, at its highest, over one call of side(*values), in a
    process that has called side(*small) before: libraries, thread pools and code are loaded then.
    """
    if not os.path.exists("/proc/self/clear_refs"):
        return []
    used = {n: _run(_line("growth", side, values, small)) / 2**20 for n, side in sides.items()}
    ours, theirs = used.values()
    shown = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in used.items())
    return [f"peak memory: {shown}, ratio {ours / theirs:.2f}"]


def _line(kind, function, *values):
    given = [json.dumps(v, default=vars) for v in values]
    here = [sys.executable, "-m", "experiments.bench.timing"]
    return [*here, kind, function.__module__, function.__name__, *given]


def _run(line):
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(kind, module, name, *given):
    """What the command lines of `_line` do."""
    function = getattr(importlib.import_module(module), name)
    values, *small = (json.loads(v, object_hook=lambda d: argparse.Namespace(**d)) for v in given)
    if kind == "serve":
        return serve(function(*values))
    if kind == "growth":
        function(*small[0])()
        return print(growth(function(*values)))
    return print(json.dumps(function(*values)))


# ---- memory --------------------------------------------------------------------------------------


def resident(key):
    """VmRSS, VmHWM (its highest) or RssAnon of this process in bytes (Linux)."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def trim():
    """Gives unused memory back; the high-water mark VmHWM starts again."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def growth(call):
    """Bytes by which the resident set rises, at its highest, over one call."""
    trim()
    before = resident("VmRSS")
    results = call()
    high = resident("VmHWM")
    del results
    return high - before


# ---- reports -------------------------------------------------------------------------------------


def quartiles(values):
    """(lower quartile, median, upper quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def speeds(times, amount, unit="audio-seconds"):
    """Lines for `report`: so much of a unit in the median of each side's times."""
    return [
        f"{name}: {amount / quartiles(values)[1]:,.0f} {unit} a second"
        for name, values in times.items()
    ]


def report(title, times, *, ours, peer=None, extra=()):
    """Prints medians with quartiles and the quartiles of the per-round ratios peer / ours."""
    print(f"## {title}")
    for name, values in times.items():
        low, mid, high = quartiles(values)
        print(f"  {name:<28} {1e3 * mid:10.2f} ms   [{1e3 * low:.2f}, {1e3 * high:.2f}]")
    for line in extra:
        print(f"  {line}")
    if peer is not None:
        print_ratio(times, ours, peer)


def print_ratio(times, ours, peer):
    """Prints how many times as fast as the peer ours is (above 1 = ours is faster)."""
    ratios = [p / o for p, o in zip(times[peer], times[ours], strict=True)]
    low, mid, high = quartiles(ratios)
    print(f"  {ours} is {mid:.2f}x as fast as {peer}   [{low:.2f}, {high:.2f}]")


def machine():
    """One line about the machine: cores, load, versions."""
    import jax

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    device = jax.devices()[0]
    return (
        f"{threads()} cores, load {load:.1f}, {device.platform} {device.device_kind}, "
        f"python {platform.python_version()}, jax {jax.__version__}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
