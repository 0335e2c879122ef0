"""Test settings: eight virtual CPU devices, programs that compile fast, a compile cache, and the
shared data when it exists."""

import ctypes
import gc
import importlib.metadata
import os
import pathlib
import sys
import tempfile

import pytest


def compiler_flags(flags):
    """XLA_FLAGS with eight devices, and without the expensive passes of the compiler.

    What takes time in the tests is compilation, of programs that run once and for milliseconds.
    Who sets the level (XLA's own is 3) has them compiled as a user's are, in two to three times
    the time.
    """
    flags = flags.split()
    if not any("xla_force_host_platform_device_count" in flag for flag in flags):
        flags.append("--xla_force_host_platform_device_count=8")
    if not any("xla_backend_optimization_level" in flag for flag in flags):
        flags += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
        if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11.")):
            flags.append("--xla_cpu_use_fusion_emitters=false")  # unknown to later ones
    return " ".join(flags)


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = compiler_flags(os.environ.get("XLA_FLAGS", ""))
os.environ.setdefault("JASR_CACHE", os.path.join(tempfile.gettempdir(), "jasr-test-cache"))

ROOT = pathlib.Path(__file__).resolve().parent.parent
LARGE = allowed = 3 << 29  # bytes: 1.5 GiB
NO_GOLDENS = "the large goldens and recordings are not here (JASR_SHARED names their folder)"


def pytest_collection_modifyitems(config, items):
    """With JASR_FAST: of each file the tests marked `fast`, else its first one."""
    if not os.environ.get("JASR_FAST"):
        return
    by_file = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    kept = []
    for found in by_file.values():
        kept += [item for item in found if item.get_closest_marker("fast")] or found[:1]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_terminal_summary(terminalreporter):
    """Gives all tests that skip for want of goldens one place, so that they share one line."""
    for report in terminalreporter.stats.get("skipped", []):
        if NO_GOLDENS in str(report.longrepr):
            report.longrepr = (str(ROOT / "tests" / "conftest.py"), 1, f"Skipped: {NO_GOLDENS}")


def resident():
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def pytest_runtest_logfinish():
    """Bounds the memory of a test process, which would grow to 5 GB.

    Most of it is what the compiler has freed and glibc keeps; the programs follow if that is not
    enough.
    """
    global allowed
    if resident() < allowed:
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
    trim(0)
    if resident() > LARGE and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
        trim(0)
    allowed = max(LARGE, resident() + LARGE // 3)


@pytest.fixture(scope="session")
def root():
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def goldens():
    """The committed goldens."""
    return ROOT / "tests" / "goldens"


@pytest.fixture(scope="session")
def shared_dir():
    """The folder of full goldens and real speech beside the checkout; skips without it."""
    path = pathlib.Path(os.environ.get("JASR_SHARED", ROOT.parent / "shared"))
    if not (path / "goldens").is_dir():
        pytest.skip(NO_GOLDENS)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """(manifest, entries) of 24 utterances of noise, not to be changed."""
    from tests.corpora import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def golden(goldens, request):
    """name -> dict of arrays of the reference fast-weight code: first those committed,
    then those of the shared folder."""
    from tests.arrays import golden_in

    return golden_in(goldens, request)
