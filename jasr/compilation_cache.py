"""The persistent compilation cache: a program compiled once is loaded the next time.

On by default in every entry point, at `~/.cache/jasr/xla`. `JASR_CACHE=DIR` moves it and
`JASR_CACHE=off` (or an empty value) turns it off.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax


def enable() -> Path | None:
    """The directory that compiled programs are now kept in; None where the cache is off.

    Call it before the first compilation. Programs compiled for CPU are made for one machine's
    instruction set, so each kind of machine has a directory of its own. A directory that JAX was
    given already (JAX_COMPILATION_CACHE_DIR) stays. A home that cannot be written to turns the
    cache off rather than stop the run.
    """
    given = jax.config.jax_compilation_cache_dir
    if given:
        return Path(given)
    root = os.environ.get("JASR_CACHE", str(Path.home() / ".cache" / "jasr" / "xla"))
    if root.lower() in ("", "off", "0", "none"):
        return None
    directory = Path(root).expanduser() / machine()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(directory, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # JAX keeps what took over a second to compile; a start is a hundred programs smaller than that.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


def machine() -> str:
    """A name for this kind of machine: architecture, then a hash of its instruction set."""
    features = platform.processor() + platform.system()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        kept = ("model name", "flags", "Features", "CPU part")
        features += "".join(sorted({line for line in lines if line.startswith(kept)}))
    except OSError:
        pass
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
