"""One process a run directory, and signals that ask for a last checkpoint."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from jasr.training import rundir

HOLD = """
import sys, time
from jasr.training import rundir
try:
    with rundir.lock(sys.argv[1]):
        print("won", flush=True)
        sys.stdin.read()
except rundir.WorkdirBusy as e:
    print("refused:", e, flush=True)
"""


def start(root, workdir, code=HOLD):
    """A process that takes the lock and holds it until its standard input is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(workdir)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_second_process_is_refused_and_told_who_holds_the_directory(root, tmp_path):
    with rundir.lock(tmp_path / "new" / "run"):
        told = start(root, tmp_path / "new" / "run").communicate()[0]
    assert told.startswith("refused:")
    assert f"process {os.getpid()} on {socket.gethostname()}" in told
    assert start(root, tmp_path / "new" / "run").communicate()[0] == "won\n"


def test_lock_of_a_killed_process_is_taken_over(root, tmp_path):
    holder = start(root, tmp_path)
    assert holder.stdout.readline() == "won\n"
    with pytest.raises(rundir.WorkdirBusy, match=f"process {holder.pid} "):
        with rundir.lock(tmp_path):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with rundir.lock(tmp_path):
        assert json.loads((tmp_path / rundir.LOCK).read_text())["pid"] == os.getpid()


def test_exactly_one_of_twenty_starters_wins(root, tmp_path):
    starters = [start(root, tmp_path) for _ in range(20)]
    while sum(p.poll() is not None for p in starters) < 19:
        time.sleep(0.02)
    told = [p.communicate()[0] for p in starters]
    assert sum(t == "won\n" for t in told) == 1
    assert sum(t.startswith("refused:") for t in told) == 19


def test_without_flock_a_run_starts_unless_the_holder_still_runs(tmp_path, monkeypatch, caplog):
    def no_flock(fd, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = {"pid": sleeper.pid, "host": socket.gethostname(), "started": "today"}
    (tmp_path / rundir.LOCK).write_text(json.dumps(holder))
    with pytest.raises(rundir.WorkdirBusy, match=f"in use by process {sleeper.pid} on"):
        with rundir.lock(tmp_path):
            pass
    for junk in ("[1]", "5", '{"pid": []}', '{"pid": 1e999}', "{", json.dumps(holder | {"pid": 0})):
        (tmp_path / rundir.LOCK).write_text(junk)  # nobody that can be asked for
        with rundir.lock(tmp_path):
            pass
    (tmp_path / rundir.LOCK).write_text(json.dumps(holder))
    sleeper.kill()
    sleeper.wait()
    for _ in range(2):
        with rundir.lock(tmp_path):
            assert json.loads((tmp_path / rundir.LOCK).read_text())["pid"] == os.getpid()
    assert "has no file locks" in caplog.text


def test_a_forked_child_that_outlives_its_parent_does_not_hold_the_lock(root, tmp_path):
    fork = 'os.fork() or (os.write(w, b"1"), time.sleep(9), os._exit(0))'
    code = HOLD.replace('print("won"', f'r, w = os.pipe(); {fork}; os.read(r, 1); print("won"')
    p = start(root, tmp_path, "import os, time" + code)
    assert p.stdout.readline() == "won\n"
    p.kill()
    p.wait()
    with rundir.lock(tmp_path):
        pass


def test_first_signal_sets_the_flag_and_the_second_interrupt_raises():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with rundir.StopFlag() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
