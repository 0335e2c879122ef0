"""Weights by path: a run, one step, an average, or a model of an original system.

An origin is what names weights for later, as JSON:

    {"path", "item", "sha256"}            and, of an original's files, "files": {name: [bytes, mtime
                                          in ns]}, so that they are hashed again only if they differ
    "part", "to", "from"                  of a part: its name, and where its parameters stand in the
                                          model that they are for and in the one they come from
    "leaves"                              in a step: the frozen parameters that it gives

`leaves` of it are array-likes that are read when they are used. A step that was trained with frozen
weights of other origins names these in its meta, as "frozen_from": one, or a list.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil

import jax

from jasr import checkpoint, sharding, tree
from jasr.checkpoint import read
from jasr.checkpoint.files import APART, delete, link, read_manifest, read_meta, seal
from jasr.checkpoint.steps import EXPORTED, EXPORTS
from jasr.systems import catalogue

KEPT = "frozen_from"  # beside a run's checkpoints: the frozen weights that it was given


def find(path, like=""):
    """The seam.Original of which a file or directory is, None if it is of none.

    like: path of what its config and tokenizer are taken from, for files of weights alone.

    Raises:
      ValueError: `like` is given for something that has its own.
    """
    for system in catalogue.every():
        for place in system.originals.values():
            original = catalogue.resolve(place)
            if original.files(path, like):
                return original
    return None


# ---- names of weights ----------------------------------------------------------------------------


def resolve(path, item=""):
    """The origin that names the same weights later and elsewhere on this machine.

    A run becomes its newest good step, a directory with one file of weights that file, a relative
    path an absolute one, and an item that was left open ("") the one that is read: a run that
    trains on does not change what was taken from it. Files are hashed on process 0 only.
    """
    origin = place(path, item)
    path = origin["path"]
    if not find(path):
        return origin | {"sha256": read_manifest(pathlib.Path(path))["sha256"]}
    stamps = _stamps(_files(path))
    sha256 = _digest(_files(path)) if jax.process_index() == 0 else ""
    return origin | {"sha256": sha256, "files": stamps}


def place(path, item=""):
    """{"path", "item"} of `resolve`, without reading the weights."""
    if original := find(path):
        files = original.files(path, "")
        return {"path": os.path.abspath(files[0] if len(files) == 1 else path), "item": "params"}
    path = str(checkpoint.find_step(path, items=()))
    return {"path": path, "item": item or ("ema" if "ema" in checkpoint.items(path) else "params")}


def _files(path):
    original = find(path)
    return original.files(path, "") if original else (path,)


@contextlib.contextmanager
def _opened(path):
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as e:
        raise checkpoint.CheckpointError(f"{path} cannot be read: {e.strerror}") from e


def _stamps(files):
    """{file name: [bytes, time of the last change in ns]}."""
    found = {}
    for path in files:
        with _opened(path) as file:
            stat = os.fstat(file.fileno())
        found[os.path.basename(path)] = [stat.st_size, stat.st_mtime_ns]
    return found


def _digest(files):
    """SHA-256 of a file; of several that of their names and digests."""
    found = []
    for path in files:
        with _opened(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.append([os.path.basename(path), digest])
    if len(found) == 1:
        return found[0][1]
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()


def _holds(path, origin):
    """Whether a path holds the weights that an origin names."""
    try:
        if (pathlib.Path(path) / checkpoint.MANIFEST).exists():
            return read_manifest(pathlib.Path(path))["sha256"] == origin["sha256"]
        same = _stamps(_files(path)) == origin.get("files")
        return same or jax.process_index() > 0 or _digest(_files(path)) == origin["sha256"]
    except checkpoint.CheckpointError:
        return False


def origins(meta):
    """The origins of a step's frozen parameters, a list."""
    found = meta.get("frozen_from") or []
    return found if isinstance(found, list) else [found]


# ---- what they hold ------------------------------------------------------------------------------


def load_meta(origin, tokens=True):
    """{"config", "tokenizer", ...} that the weights were trained with.

    Args:
      origin: what `resolve` made.
      tokens: False: the tokenizer is not asked for, and an original's vocabulary may be missing.
    """
    if original := find(origin["path"]):
        return original.meta(origin["path"], "", tokens)
    return checkpoint.load_meta(origin["path"])


def leaves(origin, verify=True):
    """{"params/..." or "batch_stats/...": array-like} of what `resolve` named, with its frozen
    parameters, in the dtypes of the files.

    verify: compare the checksums of a step's files (on process 0).

    Raises:
      checkpoint.CheckpointError: the weights are not there any more, are others, or are damaged.
    """
    path = origin["path"]
    if not os.path.exists(path):
        raise checkpoint.CheckpointError(f"{path} is not there")
    if not _holds(path, origin):
        raise checkpoint.CheckpointError(
            f"{path} does not hold the weights that were taken from it (its checksum changed)"
        )
    if original := find(path):
        return original.leaves(path, "")
    if verify and jax.process_index() == 0:
        checkpoint.find_step(path, items=("params", "ema", "batch_stats", "frozen"))
    directory = pathlib.Path(path)
    return step_leaves(directory, origin["item"], checkpoint.items(path), load_meta(origin))


def step_leaves(directory, item, items, meta):
    """`leaves` of a step's directory, sealed or not.

    Args:
      item: the tree that is taken as the parameters. items: the trees that are there.
      meta: the step's; its origins of frozen parameters are looked for beside the step, too.
    """
    found = {}
    for name, target in ((item, "params"), ("frozen", "params"), ("batch_stats", "batch_stats")):
        if name in items:
            found |= {f"{target}/{p}": x for p, x in read.arrays(directory / name).items()}
    for origin in origins(meta):
        near = (directory, directory.parent, directory.parent.parent)
        try:
            given = renamed(leaves(locate(origin, *near)), origin)
        except (checkpoint.CheckpointError, OSError) as e:
            raise checkpoint.CheckpointError(
                f"{directory} holds trained parameters only; its frozen ones came from "
                f"{origin['path']}, which cannot be read: {e}"
            ) from e
        named = origin.get("leaves")
        wanted = given if named is None else (f"params/{p}" for p in named)
        for path in wanted:
            if path.startswith("params/"):
                found.setdefault(path, given[path])
    return found


def renamed(found, origin):
    """The leaves of an origin's part, under the names that they have in the model they are for."""
    ours, theirs = origin.get("to", ""), origin.get("from", "")
    result = {}
    for path, leaf in found.items():
        collection, _, name = path.partition("/")
        if not theirs or name.startswith(theirs + "/"):
            inside = name[len(theirs) :].lstrip("/")
            result["/".join(filter(None, (collection, ours, inside)))] = leaf
    return result


def in_memory(found):
    """(params, batch_stats) as numpy trees of leaves {path: array-like}."""
    made = tree.unflatten(read.in_memory(found))
    return made.get("params", {}), made.get("batch_stats", {})


def opened(path, step=None, item="", like=""):
    """(meta, leaves) of the model at a path; see `loading.load`.

    Raises:
      checkpoint.CheckpointError: nothing good is there.
      ValueError: a step or an item of an original.
    """
    if original := find(path, like):
        if step is not None or item:
            raise ValueError(f"{path} has neither steps nor items; leave out --step and --item")
        return original.meta(path, like, True), original.leaves(path, like)
    # One step for all parts: each load by itself could fall back to another one.
    path = checkpoint.find_step(path, step, items=("params", "ema", "batch_stats", "frozen"))
    return checkpoint.load_meta(path), leaves(resolve(path, item), verify=False)


# ---- copies of what a run needs ------------------------------------------------------------------


def keep(origin, workdir):
    """`origin` as a copy in the run directory `workdir`, which its own run cannot delete.

    A run lets old steps go; the frozen weights of another run must not go with them, nor those
    that the other run was given by a third, which are kept inside the copy. The copy is made of
    hard links where the file system can. An original's files are not copied.
    """
    if find(origin["path"]):
        return origin
    directory = pathlib.Path(workdir).absolute() / _kept(origin)
    if jax.process_index() == 0:
        _copy(origin, directory)
    sharding.meet()
    return origin | resolve(directory, origin["item"])


def _kept(origin):
    return "-".join(filter(None, (KEPT, origin.get("part", ""))))


def _copy(origin, directory):
    wanted = (origin["item"], "batch_stats", "frozen")
    step = checkpoint.find_step(origin["path"], items=wanted)
    names = [name for name in checkpoint.items(step) if name in wanted]
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name in (*names, "meta"):
        shutil.copytree(step / name, temporary / name, copy_function=link)
    for path in step.glob(f"{APART}*"):
        link(path, temporary / path.name)
    for inner in origins(checkpoint.load_meta(step)):
        if find(inner["path"]):
            continue
        inner = locate(inner, step, step.parent, step.parent.parent)  # as it is: its checksum
        if not _holds(inner["path"], inner):
            raise checkpoint.CheckpointError(
                f"{step} holds trained parameters only; its frozen ones, {inner['path']}, are "
                "not there or are others"
            )
        shutil.copytree(inner["path"], temporary / _kept(inner), copy_function=link)
    seal(temporary, step=read_manifest(step)["step"], items=names)
    delete(directory)
    temporary.rename(directory)


def locate(origin, *near):
    """`origin`, or what `keep` made of it in one of the directories `near`: where its checksum
    is right, else where something is."""
    places = [pathlib.Path(origin["path"]), *(pathlib.Path(d) / _kept(origin) for d in near)]
    there = [p for p in places if p.exists()] or places[:1]
    right = (p for p in there if len(there) > 1 and _holds(p, origin))
    return origin | {"path": str(next(right, there[0]))}


# ---- exports -------------------------------------------------------------------------------------


def exports(task):
    """The `exporter` of a run's Checkpoints: writes its steps in other formats of the system.

    Raises (of the exporter):
      ValueError: a format or option that the system does not have, or that cannot hold the model.
    """

    def write(directory, items, names):
        meta = read_meta(directory)
        leaves = step_leaves(directory, "ema" if "ema" in items else "params", items, meta)
        folder = directory / EXPORTS
        folder.mkdir()
        for text in names:
            name, options = parse_export(task, text)
            ending = catalogue.resolve(catalogue.get(task).originals[name]).endings[0]
            export(name, folder / f"{EXPORTED}{ending}", meta, leaves, options)

    return write


def parse_export(task, text):
    """(format, {option: value}) of an entry of config.checkpoint.export, "hf:branch=ctc".

    Raises:
      ValueError: a format or option that the system of `task` does not have.
    """
    name, _, rest = text.partition(":")
    flags, options = _checked(catalogue.get(task), name), {}
    for part in filter(None, rest.split(",")):
        option, _, value = part.partition("=")
        if option not in flags:
            raise ValueError(f"config.checkpoint.export {text!r}: no option {option!r}")
        flag = flags[option]
        if flag.choices and value not in flag.choices:
            raise ValueError(f"config.checkpoint.export {text!r}: choose {', '.join(flag.choices)}")
        options[option] = flag.parse(value) if not flag.switch else True
    return name, options


def _checked(system, name):
    """The flags of an export, if the system has the format."""
    if name not in system.originals:
        known = ", ".join(system.originals) or "none"
        raise ValueError(f"{system.name} models have no format {name!r}; those they have: {known}")
    return system.options["convert"].flags if "convert" in system.options else {}


def format_of(path):
    """The name of the original's format that a target's name asks for, "" if it asks for none."""
    for system in catalogue.every():
        for name, place in system.originals.items():
            if str(path).rstrip("/").endswith(catalogue.resolve(place).endings):
                return name
    return ""


def export(name, path, meta, leaves, options):
    """Writes a model in the format `name` of its system; [what was written, notes ...].

    Args:
      meta, leaves: as `opened` gives them. options: {name: value} of the system's for "convert".

    Raises:
      ValueError: the system has no such format or option, or the format cannot hold the model.
    """
    system = catalogue.get(meta["config"]["task"])
    has = _checked(system, name)
    if unknown := [option for option in options if option not in has]:
        raise ValueError(f"--{', --'.join(unknown)}: no option of {system.name} models")
    return catalogue.resolve(system.originals[name]).write(path, meta, leaves, options)
