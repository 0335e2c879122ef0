"""NeMo's transducer losses: the `loss` section of a config as our settings, and back."""

import math
import warnings

DEFAULT = "warprnnt_numba"  # what NeMo takes for the name "default", and whose numbers it reads
_COMMON, _TDT = ("fastemit_lambda", "clamp"), ("sigma", "omega")
# (our kind, the numbers that are read from <name>_kwargs) of NeMo's implementations.
_LOSSES = {
    "warprnnt_numba": ("rnnt", _COMMON),
    "rnnt": ("rnnt", _COMMON),
    "warprnnt": ("rnnt", ()),
    "pytorch": ("rnnt", ()),
    "tdt": ("tdt", (*_COMMON, *_TDT)),
    "tdt_pytorch": ("tdt", ("sigma",)),
}
_USUAL = {"fastemit_lambda": 0.0, "clamp": -1.0, "sigma": 0.0, "omega": 0.0}
_BOUNDS = {"fastemit_lambda": (0, math.inf), "sigma": (0, math.inf), "omega": (0, 1)}
REDUCTIONS = ("mean", "sum", "mean_batch", "mean_volume")
LONGEST = 1000  # frames of a duration


class LossError(ValueError):
    """A loss that NeMo or jasr does not have; lists everything that is wrong with it."""


def read(nemo):
    """The loss section of a transducer's NeMo config: kind "rnnt" or "tdt", reduction, and numbers.

    Raises:
      LossError: an unknown name, or numbers that the loss cannot have.
    """
    loss = nemo.get("loss") or {}
    name = str(loss.get("loss_name") or "default")
    name = DEFAULT if name == "default" else name
    if name not in _LOSSES:
        raise LossError(f"loss.loss_name is {name!r}; known are default, {', '.join(_LOSSES)}")
    kind, used = _LOSSES[name]
    section, problems = f"{name}_kwargs", []
    given = loss.get(section) or {}
    values = {"kind": kind, "reduction": reduction(nemo, "rnnt_reduction")}
    for key in (*_COMMON, *(_TDT if kind == "tdt" else ())):
        value = _USUAL[key] if given.get(key) is None else given[key]
        low, high = _BOUNDS.get(key, (-math.inf, math.inf))
        if not _is_number(value) or not low <= value <= high:
            problems.append(f"loss.{section}.{key} is {value!r}")
        elif key not in used and value != _USUAL[key]:
            note = f"loss.{section}.{key} of the file is not used: NeMo's {name} does not read it"
            warnings.warn(note, stacklevel=2)
            value = _USUAL[key]
        values[key] = value
    if kind == "tdt":
        durations = given.get("durations") or (nemo.get("decoding") or {}).get("durations")
        if not durations:
            problems.append(f"loss.{section}.durations is missing")
        elif not are_durations(durations):
            problems.append(
                f"loss.{section}.durations is {durations!r:.80}; it lists frames from 0 to "
                f"{LONGEST}, each once and one of them above 0"
            )
        else:
            values["durations"] = tuple(durations)
    if problems:
        raise LossError("; ".join(problems))
    return values


def reduction(section, key):
    """How utterance losses become one number, as a config's section says under `key`.

    Raises:
      LossError: NeMo does not know it.
    """
    name = section.get(key) or "mean_batch"
    if name not in REDUCTIONS:
        raise LossError(f"{key} is {name!r}; known are {', '.join(REDUCTIONS)}")
    return name


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def are_durations(values):
    """Whether `values` list numbers of frames, each once and one of them above 0."""
    return (
        isinstance(values, list | tuple)
        and all(type(value) is int and 0 <= value <= LONGEST for value in values)
        and len(set(values)) == len(values)
        and max(values, default=0) > 0
    )


def write(loss):
    """The `loss` section of our settings, with the name that NeMo looks their numbers up by."""
    names = [*_COMMON, *(_TDT if loss["kind"] == "tdt" else ())]
    numbers = {name: loss[name] for name in names}
    if loss["kind"] == "tdt":
        return {
            "loss_name": "tdt",
            "tdt_kwargs": {**numbers, "durations": list(loss["durations"])},
        }
    return {"loss_name": DEFAULT, f"{DEFAULT}_kwargs": numbers}
