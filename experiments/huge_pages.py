"""Huge memory pages for the arrays of a CPU program, where Linux leaves the choice to it."""

import os
import pathlib
import platform
import sys

TUNABLE = "glibc.malloc.hugetlb"
MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use():
    """Starts this command again with glibc's malloc asking for huge pages; first thing in a main.

    XLA's CPU programs take their working memory from malloc at every step and give it back, and
    with pages of 4 KiB the kernel hands out tens of thousands of them each time: a quarter of the
    processor time of training the AN4 recipe. Only the environment of a new process can change it,
    so this process is replaced (its number stays). Nothing happens where the kernel decides by
    itself ("always", "never"), without glibc 2.35, where GLIBC_TUNABLES settles it, or with
    JASR_HUGE_PAGES=off.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or os.environ.get("JASR_HUGE_PAGES", "").lower() in ("off", "0"):
        return
    try:
        mode = MODE.read_text()
    except OSError:
        return
    kind, version = platform.libc_ver()
    known = kind == "glibc" and tuple(int(x) for x in version.split(".")[:2]) >= (2, 35)
    if "[madvise]" not in mode or not known:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{TUNABLE}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
