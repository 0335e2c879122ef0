"""Averages of NeMo's checkpoints: .ckpt files, into a .ckpt or a .nemo, and zarr directories.

    chosen = averaging.select(find_files("exp/checkpoints"), top_n=3)  # or steps=(14000, 25000)
    weights, how = averaging.weigh(chosen)  # given, in proportion to 1 / val_wer, or equal
    average = average_files(chosen, weights, how=how)
    write_ckpt("best3.ckpt", average)
    write_nemo("best3.nemo", average.state, input_nemo="exp/model.nemo")

The mean is `averaging.average`'s, in f32 or wider and one tensor at a time. Files are mapped, so it
needs memory for one result. What has no mean (counters, codes, Transformer Engine's _extra_state)
comes from one member.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
import warnings

import jax.numpy as jnp
import numpy as np

from jasr import averaging, tree
from jasr.averaging import PROVENANCE, AverageError, Member
from jasr.averaging.mean import check_floats, check_same, means
from jasr.averaging.members import provenance
from jasr.interop import nemo_archive, plain_yaml, torch_file, zarr_checkpoint

STATE = "_extra_state"
CKPT_KEY = "jasr_average"  # where a .ckpt that was written here says how it was made
# What Lightning needs beside the weights to build the model.
KEPT = ("epoch", "global_step", "pytorch-lightning_version", "hparams_name", "hyper_parameters")


@dataclasses.dataclass(frozen=True)
class FileAverage:
    """The average of checkpoint files.

    state: {key: array}, a state dict in the order and dtypes of the best member; tied tensors are
    one array. best: the Member that gave what has no mean. provenance: members, weights, metrics.
    """

    state: dict = dataclasses.field(repr=False)
    best: Member
    provenance: dict = dataclasses.field(repr=False)


def _members(given, weights, how, member_at):
    """(Members, weights, provenance) of Members or paths, none of which may be there twice."""
    members = [m if isinstance(m, Member) else member_at(m) for m in given]
    how = how or ("equal" if weights is None else "given")
    weights = averaging.normalised(weights, len(members))
    averaging.check_once(members)
    return members, weights, provenance(members, weights, how)


# ---- .ckpt files ---------------------------------------------------------------------------------


def find_files(folder, ema=False):
    """The Members of a folder of .ckpt files, by step; "last" and "-last" copies are left out.

    Steps and metrics are read from names, "step=14000-val_wer=0.0652-val_loss=1.50.ckpt"; the step
    of a file without it from its global_step. Averages, jasr's and NeMo's, are left out.

    Args:
      ema: take the "...-EMA.ckpt" files, instead of those without it.

    Raises:
      AverageError: no such file.
    """
    found = []
    for path in sorted(pathlib.Path(folder).absolute().glob("*.ckpt")):
        plain = path.stem.removesuffix("-EMA")
        if path.is_file() and ema == (plain != path.stem):
            if not averaging.is_last(plain) and not _was_averaged(path, plain):
                found.append(file_member(path))
    if not found:
        what, hint = ("-EMA.ckpt", "") if ema else (".ckpt", "; -EMA.ckpt files do with --ema")
        raise AverageError(
            f"no {what} file in {folder} (last copies and averages do not count{hint})"
        )
    return sorted(found, key=lambda m: m.step)


def file_member(path):
    """The Member of a .ckpt file."""
    path = pathlib.Path(path).absolute()
    named = averaging.parse_name(path.name)
    step = named.pop("step", None)
    if step is None:
        step = _saved(path).get("global_step", 0)
        if not isinstance(step, int):
            raise AverageError(f"{path}: global_step is no whole number; put step=... in its name")
    return Member(path, int(step), named)


def _was_averaged(path, plain):
    try:
        return plain.endswith("-averaged") or CKPT_KEY in _saved(path)
    except (AverageError, torch_file.TorchFileError):
        return False  # it is told when the file is chosen


def average_files(members, weights=None, *, how="", integers="copy", best=None):
    """The FileAverage of .ckpt files (Lightning's, or bare state dicts).

    Args:
      members: Members or paths.
      weights: see `averaging.average`; equal if None.
      how: where the weights come from, for the provenance.
      integers: "copy" from the best member; "sum" as NeMo's script does, which makes nonsense of
        num_batches_tracked, to compare with what it wrote.
      best: the Member that gives what has no mean; `best_of` if None.

    Raises:
      AverageError: keys, shapes or dtypes that differ, NaN or infinity, one file or a copy of it
        given twice, unusable weights.
      TorchFileError: a file that cannot be read.
    """
    if integers not in ("copy", "sum"):
        raise ValueError(f"integers={integers!r}: choose copy or sum")
    members, weights, made = _members(members, weights, how, file_member)
    best = best or averaging.best_of(members)
    states, names = [_state(m.path) for m in members], [str(m.path) for m in members]
    arrays = [{k: v for k, v in s.items() if _is_array(k, v)} for s in states]
    check_same(arrays, names)
    first, tied = _state(best.path), _tied(arrays)
    floats = {
        k for k, v in first.items() if _is_array(k, v) and jnp.issubdtype(v.dtype, np.floating)
    }
    own = [k for k in first if k in floats and tied.get(k, k) == k]
    found = means([{k: s[k] for k in own} for s in states], weights, names)
    state = {}
    for key, value in first.items():
        if key in floats:
            state[key] = found[tied.get(key, key)]
        elif integers == "sum" and _is_array(key, value) and value.dtype.kind in "iu":
            state[key] = np.sum([s[key] for s in states], axis=0, dtype=value.dtype)
        else:
            state[key] = np.array(value) if isinstance(value, np.ndarray) else value
    return FileAverage(state, best, made)


def write_ckpt(path, average):
    """Writes a FileAverage as a Lightning checkpoint, with the best member's epoch, step and
    hyper-parameters; those that are no plain data are left out with a warning.
    """
    saved = _saved(average.best.path)
    out = {"state_dict": average.state, CKPT_KEY: average.provenance}
    for key in filter(saved.__contains__, KEPT):
        value = plain_yaml.plain(saved[key])
        try:
            json.dumps(value)
            out[key] = value
        except TypeError:
            warnings.warn(
                f"{key} of {average.best.path} has objects that are not read; it is left out "
                f"of {path}",
                UserWarning,
                stacklevel=2,
            )
    torch_file.write(path, out)


def write_nemo(output, state, input_nemo):
    """Writes the .nemo `input_nemo` with the weights `state` instead of its own.

    Raises:
      AverageError: other names or shapes than the archive's weights have: NeMo loads strictly.
      ArchiveError, TorchFileError: an archive that cannot be read.
    """
    folder = os.path.dirname(os.path.abspath(output))
    with (
        nemo_archive.opened(input_nemo) as archive,
        tempfile.TemporaryDirectory(dir=folder, prefix=".jasr-") as temporary,
    ):
        start, size = archive.member(nemo_archive.WEIGHTS)
        wanted = torch_file.read(archive.tar, start=start, size=size)
        try:
            tree.compare(wanted, state, what=f"the average beside the weights of {input_nemo}")
        except tree.TreeError as e:
            raise AverageError(str(e)) from None
        files = {}
        for number, (name, (start, size)) in enumerate(archive.members.items()):
            files[name] = os.path.join(temporary, str(number))
            if name == nemo_archive.WEIGHTS:
                torch_file.write(files[name], {key: state[key] for key in wanted})
            else:
                np.fromfile(archive.tar, np.uint8, size, offset=start).tofile(files[name])
        nemo_archive.write(output, files)


def _saved(path):
    saved = torch_file.read(path)
    if not isinstance(saved, dict):
        raise AverageError(f"{path} holds a {type(saved).__name__}, no state dict")
    return saved


def _state(path):
    """The state dict {key: array mapped from the file, or what else it holds} of a .ckpt."""
    saved = _saved(path)
    state = saved.get("state_dict", saved)
    if isinstance(state, dict) and all(isinstance(k, str) for k in state):
        if any(isinstance(v, np.ndarray) for v in state.values()):
            return state
    raise AverageError(f"{path} holds no state dict")


def _is_array(key, value):
    return isinstance(value, np.ndarray) and not key.endswith(STATE)


def _tied(states):
    """{key: first key of the same memory}, for tensors that are tied in every file."""
    first, found = {}, {}
    for key in states[0]:
        arrays = [s[key] for s in states]
        if all(a.size for a in arrays):
            where = tuple((a.ctypes.data, a.shape, a.strides) for a in arrays)
            found[key] = first.setdefault(where, key)
    return found


# ---- zarr directories ----------------------------------------------------------------------------


def find_directories(folder, steps=()):
    """The Members of a folder of zarr checkpoints: those of `steps`, in their order, or all, by
    step. Names that end in "0-last" or "-last", and averages, are left out; without `steps`
    directories without an array too, with a warning that names them.

    Raises:
      AverageError: none, or a step that is not there once ("...-step=N-...").
    """
    found, others = [], []
    for path in sorted(pathlib.Path(folder).absolute().iterdir()):
        name = path.name
        if path.is_dir() and not averaging.is_last(name) and not name.endswith("-averaged"):
            named = averaging.parse_name(name)
            if not steps and not any(path.rglob(zarr_checkpoint.HEADER)):
                others.append(name)
            elif "step" in named or not steps:
                found.append(Member(path, named.pop("step", 0), named))
    if others:
        told = f"{folder}: left out, since there is no zarr array in them: {', '.join(others)}"
        warnings.warn(told, UserWarning, stacklevel=2)
    if not found:
        raise AverageError(f"no checkpoint directory in {folder}")
    return averaging.select(found, steps=steps) if steps else sorted(found, key=lambda m: m.step)


def directory_name(prefix, steps=()):
    """The name that NeMo gives to an average: "PREFIX-averaged", "PREFIX-STEP_STEP-averaged"."""
    return "-".join([prefix, *(["_".join(map(str, steps))] if steps else []), "averaged"])


def average_directories(members, output, weights=None, *, how=""):
    """Writes the average of zarr checkpoints to the directory `output`; returns its provenance.

    Files, directories without an array, optimizer.* and *._extra_state are copied from the first
    member. The result appears whole or not at all.

    Args:
      members: Members or paths.
      weights: see `averaging.average`; equal if None.

    Raises:
      AverageError: as `average_files`; also an integer array, an array deeper inside than the
        others (but in optimizer.*), or an output that is there.
      ZarrError: an array that is damaged.
    """
    members, weights, made = _members(
        members, weights, how, lambda m: Member(pathlib.Path(m).absolute(), 0, {})
    )
    output = pathlib.Path(output).absolute()
    if output.exists():
        raise AverageError(f"{output} exists: choose another output")
    stores, names = [_store(m.path) for m in members], [str(m.path) for m in members]
    check_same(stores, names)
    check_floats(stores[0], names[0])
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, array in stores[0].items():
            mean = means([{name: s[name]} for s in stores], weights, names)[name]
            zarr_checkpoint.write(partial, name, mean, array)
        for path in sorted(members[0].path.iterdir()):
            if path.is_dir() and path.name not in stores[0]:
                shutil.copytree(path, partial / path.name)
            elif path.is_file():
                shutil.copy(path, partial)
        (partial / PROVENANCE).write_text(json.dumps(made, indent=1), encoding="utf-8")
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def _store(folder):
    """The arrays of a directory that are averaged; none may lie in what would be copied."""
    store = {k: v for k, v in zarr_checkpoint.arrays(folder).items() if not _is_copied(k)}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in store and not _is_copied(path.name):
            for header in path.rglob(zarr_checkpoint.HEADER):
                raise AverageError(
                    f"{header.parent} is an array inside {path.name}, where it would not be "
                    f"averaged; arrays must lie in {folder} itself"
                )
    return store


def _is_copied(name):
    return name.startswith("optimizer.") or name.endswith(f".{STATE}")
