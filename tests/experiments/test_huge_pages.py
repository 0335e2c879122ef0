"""A command starts again on huge pages only where that is its choice to make."""

import os
import platform
import sys

import pytest

from experiments import huge_pages

CHOICE = "always [madvise] never"


def started(monkeypatch, tmp_path, mode=CHOICE, libc=("glibc", "2.36"), **environ):
    """The arguments that the process was replaced with, and its GLIBC_TUNABLES."""
    calls = []
    for name in ("GLIBC_TUNABLES", "JASR_HUGE_PAGES"):
        monkeypatch.setenv(name, environ.get(name, ""))  # so that it is undone
    (tmp_path / "enabled").write_text(mode)
    monkeypatch.setattr(huge_pages, "MODE", tmp_path / "enabled")
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "experiments.train", "--x=1"])
    monkeypatch.setattr(os, "execv", lambda path, args: calls.append((path, args)))
    huge_pages.use()
    return calls, os.environ["GLIBC_TUNABLES"]


def test_it_starts_again_with_the_same_arguments(monkeypatch, tmp_path):
    calls, tunables = started(monkeypatch, tmp_path, GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert calls == [(sys.executable, [sys.executable, "-m", "experiments.train", "--x=1"])]
    assert tunables == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    "case",
    [
        dict(mode="[always] madvise never"),
        dict(mode="always madvise [never]"),
        dict(libc=("glibc", "2.31")),
        dict(libc=("", "")),
        dict(JASR_HUGE_PAGES="off"),
        dict(GLIBC_TUNABLES="glibc.malloc.hugetlb=0"),
    ],
)
def test_otherwise_it_goes_on(monkeypatch, tmp_path, case):
    assert started(monkeypatch, tmp_path, **case)[0] == []
