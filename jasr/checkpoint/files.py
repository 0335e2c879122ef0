"""Step directories: the manifest that makes one trustworthy, its checks, finding and deleting.

Needs neither JAX nor Orbax. See `jasr.checkpoint` for the layout.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import shutil
import warnings

MANIFEST = "jasr_manifest.json"
APART, LARGE = "tokenizer-", 1 << 16  # name of a tokenizer's file; characters from which it is one
LATE_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax writes them at the rename
READERS = min(4, os.cpu_count() or 1)  # threads that compute checksums or read leaves
_log = logging.getLogger("jasr.checkpoint")


class CheckpointError(RuntimeError):
    """A checkpoint is missing or damaged, or does not fit what it is restored into."""


def seal(directory, *, step, items, metric="", mode="min"):
    """Writes the manifest of a finished step directory, with every file flushed to the disk."""
    directory = pathlib.Path(directory)
    late = (MANIFEST, *LATE_FILES)
    found = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    names = sorted(set(found) - set(late))
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(_digest_and_flush, (found[n] for n in names))
        files = {n: [found[n].stat().st_size, d] for n, d in zip(names, digests, strict=True)}
    for path in [p for p in directory.rglob("*") if p.is_dir()]:
        sync_directory(path)
    body = {
        "format": 1, "step": step, "items": list(items), "metric": metric, "mode": mode,
        "jasr": version(), "files": files,
    }  # fmt: skip
    write_json(directory / MANIFEST, body | {"sha256": _digest(body)})


def verify(path, items=None, checksums=True):
    """The damage of a step directory, a line a file; empty when it is whole.

    Args:
      path: a step directory.
      items: only the files of these items (and meta, metrics); all if None.
      checksums: False compares names and sizes only.
    """
    path = pathlib.Path(path)
    try:
        manifest = read_manifest(path)
    except CheckpointError as e:
        return [str(e)]
    files = [
        (path / name, name, *was)
        for name, was in manifest["files"].items()
        if items is None or name.split("/")[0] in (*items, "meta", "metrics")
    ]
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        faults = pool.map(lambda file: _fault(*file, checksums), files)
        return [f for f in faults if f]


def _fault(file, name, size, digest, checksums):
    """What is wrong with one file, "" if nothing."""
    try:
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, was written with {size}"
        if checksums:
            with open(file, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != digest:
                    return f"{name} has changed since it was written (checksum)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as e:
        return f"{name} cannot be read: {e.strerror}"
    return ""


def _digest_and_flush(path):
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        os.fsync(f.fileno())
    return digest


def find_steps(path):
    """{step number: directory} of all steps, ascending, below a run or checkpoints directory.

    Raises:
      CheckpointError: there is none.
    """
    path = pathlib.Path(path).absolute()
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = step_directories(root)
    if not found:
        raise CheckpointError(
            f"no checkpoint in {path}: wanted a run directory (with checkpoints/ in it), a "
            "directory of numbered steps, or one step's directory"
        )
    return found


def is_step(path):
    """Whether a directory is one step (whole or not), rather than a directory of steps."""
    return (path / MANIFEST).exists() or (path / "_CHECKPOINT_METADATA").exists()


def find_step(path, step=None, items=None, checksums=True):
    """The directory of one good step.

    Args:
      path: a run directory, a checkpoints directory, or a step directory (an average is one).
      step: a number; "best" by the run's metric; None or "latest" = the newest. With None,
        "latest" and "best" a damaged step is reported and the next one used.
      items, checksums: what is verified, see `verify`.

    Raises:
      CheckpointError: there is no such step, or it is damaged.
    """
    path = pathlib.Path(path).absolute()
    if is_step(path):
        candidates = [path]
    else:
        found = find_steps(path)
        root = next(iter(found.values())).parent
        if step in (None, "latest"):
            candidates = list(found.values())[::-1]
        elif step == "best":
            candidates = [found[s] for s in ranked(root, list(found))]
            if not candidates:
                raise CheckpointError(f"no step in {root} has a metric to be the best by")
        elif int(step) in found:
            candidates = [found[int(step)]]
        else:
            raise CheckpointError(f"step {step} is not in {root}, which has {list(found)}")
    directory, faults = first_whole(candidates, items, checksums, told=len(candidates) > 1)
    if directory:
        return directory
    if len(faults) == 1:
        raise CheckpointError(f"damaged checkpoint {faults[0]}")
    raise CheckpointError("no usable checkpoint:\n  " + "\n  ".join(faults))


def first_whole(candidates, items=None, checksums=True, told=True):
    """(the first step directory that verifies or None, a line of damage for each before it)."""
    faults = []
    for directory in candidates:
        damage = verify(directory, items, checksums)
        if not damage:
            return directory, faults
        faults.append(f"{directory}: " + "; ".join(damage))
        if told:
            report(f"checkpoint {faults[-1]}. It is not used.")
    return None, faults


def load_metrics(directory):
    """The metrics of one step directory, {} if it has none that can be read."""
    try:
        return read_json(pathlib.Path(directory), "metrics")
    except CheckpointError:
        return {}


def items(directory):
    """The names of the trees in a step directory."""
    return list(read_manifest(pathlib.Path(directory))["items"])


def version():
    """The installed version of jasr, or "" when it runs from a bare checkout."""
    try:
        return importlib.metadata.version("jasr")
    except importlib.metadata.PackageNotFoundError:
        return ""


def write_json(path, value):
    """Writes a JSON file, as `write_text`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def step_directories(root):
    if not root.is_dir():
        return {}
    found = {int(d.name): d for d in root.iterdir() if d.name.isdecimal() and d.is_dir()}
    return dict(sorted(found.items()))


def ranked(root, steps, metric="", mode=""):
    """The steps that have the metric, best first; a tie goes to the newer, NaN is left out."""
    found = []
    for step in steps:
        directory, rule = root / str(step), {"metric": metric, "mode": mode}
        with contextlib.suppress(CheckpointError):
            rule = rule if metric else read_manifest(directory)  # by what the run itself ranked
            value = load_metrics(directory).get(rule["metric"], math.nan)
            if not math.isnan(value):
                found.append((-value if rule["mode"] == "max" else value, -step))
    return [-negative for _, negative in sorted(found)]


def read_manifest(directory):
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not there")
    try:
        body = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        digest = body.pop("sha256")
        if digest != _digest(body):
            raise ValueError
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing (half-written)") from None
    except (ValueError, KeyError, AttributeError, OSError):
        raise CheckpointError(f"{MANIFEST} is damaged") from None
    return body | {"sha256": digest}


def read_json(directory, item):
    path = directory / item / ("metadata" if item == "meta" else item)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read: {first_line(e)}") from None


# ---- what is too large for meta ------------------------------------------------------------------


def set_apart(meta):
    """(meta, {file name: text}): a large tokenizer becomes a file that is named by its checksum.

    Qwen's is 11 MB of JSON, which every step would repeat. A small one stays in meta. The file lies
    beside the checkpoints once, and every step has it as a hard link (a copy where there are no
    links), so that a step directory is whole when it is copied elsewhere alone.
    """
    value = (meta or {}).get("tokenizer")
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    if len(text) < LARGE:
        return meta, {}
    digest = hashlib.sha256(text.encode()).hexdigest()
    name = f"{APART}{digest[:12]}.json"
    kept = {"kind": value.get("kind", ""), "sha256": digest, "file": name}
    return {**meta, "tokenizer": kept}, {name: text}


def read_meta(directory):
    """The JSON dict saved beside the trees of a step directory, with what was set apart.

    Raises:
      CheckpointError: it cannot be read, or the tokenizer's file is another one.
    """
    meta = read_json(directory, "meta")
    kept = meta.get("tokenizer")
    if not isinstance(kept, dict) or "file" not in kept:
        return meta
    path = directory / pathlib.PurePath(kept["file"]).name
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise CheckpointError(f"the tokenizer {path} cannot be read: {e.strerror}") from None
    if hashlib.sha256(text.encode()).hexdigest() != kept["sha256"]:
        raise CheckpointError(f"the tokenizer {path} has changed since it was written (checksum)")
    return {**meta, "tokenizer": json.loads(text)}


def write_text(path, text):
    """Writes a text file whole or not at all: temporary name, flush to disk, rename."""
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def link(old, new):
    """Makes `new` a hard link to the file `old`, or a copy where the file system has no links."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copy(old, new)


def _digest(body):
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def delete(directory):
    """Removes a step: it vanishes under its name in one rename, then its files go."""
    if directory.exists():
        doomed = directory.with_name(directory.name + ".jasr-deleting")
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sync_directory(path):
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass  # file systems that cannot flush a directory
    finally:
        os.close(fd)


def report(text):
    _log.error(text)
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def first_line(error):
    """An exception in one line; array readers and writers raise pages."""
    text = str(error).strip()
    if "No space left" in text:
        return "the disk is full (no space left on device)"
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"
