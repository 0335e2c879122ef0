"""Sections of a foreign config as our settings, and back, by a table of typed rows.

    TABLE = Table("encoder", EncoderConfig, (
        Row("num_layers", "n_layers", usual=12),  # their key, our field, their default
        Row("conv.dropout", read={None: 0.0}),  # in a section of the section; null means 0.0 there
    ), silent=("use_fast_kernel",), only_as={"rope": (False,)})
    values = read(TABLE, section, problems)  # {"n_layers": 12, "dropout": 0.1}
    section = write(TABLE, values, what_the_file_had)

Types and limits are those of our field (`settings.field`). Nothing that a file says raises: a key
that is not known, a value of another type or beyond its limits is a sentence in `problems` with its
key and value, and all of them are found in one reading.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jasr import settings

UNSAID = type("Unsaid", (), {"__repr__": lambda _: "nothing"})()
MUST = object()  # as `usual`: there is no default
LARGEST = {int: 1 << 20, float: 1e30}  # what no setting exceeds: sizes must not keep a reader busy
_WORDS = {
    bool: "true or false",
    int: f"an integer up to {LARGEST[int]}",
    float: "a number",
    str: "a string",
    tuple: "a list",
    type(None): "null",
}
# What a conversion or a settings class raises for a value that it cannot have.
REFUSALS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


class Row(NamedTuple):
    """One setting. Rows of one field must agree in what they say, but for one that `wins`.

    key: its dotted place in their section, or several whose values make a tuple.
    ours: our field; "" = the last word of `key`. Of a table of several classes "section.field".
    usual: their default (a tuple for several keys); UNSAID = our own; MUST = there is none.
    read: {their value: ours}, or a function (value, what was read so far) -> ours or UNSAID, whose
      ValueError ends the sentence "KEY is VALUE, ...".
    write: the same back, UNSAID = not written; None = the key is only read.
    rules: other limits than those of our field, under the names of `settings.field`.
    """

    key: str | tuple
    ours: str = ""
    usual: Any = UNSAID
    read: Mapping | Callable = types.MappingProxyType({})
    write: Mapping | Callable | None = types.MappingProxyType({})
    rules: Mapping = types.MappingProxyType({})
    wins: bool = False

    @property
    def field(self):
        return self.ours or self.keys[-1].rpartition(".")[2]

    @property
    def keys(self):
        return self.key if isinstance(self.key, tuple) else (self.key,)


class Table(NamedTuple):
    """The rows of a section, and what else may stand in it.

    name: the section's, in sentences. cls: our settings class, or {section of ours: class}: types
    are those of its fields. target: the class that `_target_` names. only_as: {key: values that
    change nothing}. silent: keys that change nothing, in the section or in sections of it. also:
    {key: value} to be written where the file has none; read as silent. always: the same, and no
    other value may be read. is_open: other keys are no problem. none_is_usual: null stands for the
    default where it is no value of ours.
    """

    name: str
    cls: Any
    rows: tuple
    target: str = ""
    only_as: Mapping = types.MappingProxyType({})
    silent: tuple | frozenset = ()
    also: Mapping = types.MappingProxyType({})
    always: Mapping = types.MappingProxyType({})
    is_open: bool = False
    none_is_usual: bool = False


# ---- reading -------------------------------------------------------------------------------------


def read(table, section, problems):
    """{our field: value} of what a section says, defaults of theirs included; None if anything is
    wrong with it, which `problems` then lists."""
    before = len(problems)
    if not isinstance(section, Mapping):
        missing = f"the config has no section {table.name!r}"
        wrong = f"{table.name} is {section!r:.100}, not a mapping"
        problems.append(missing if section is None else wrong)
        return None
    if table.target:
        known, given = table.target.rpartition(".")[2], section.get("_target_")
        if str(given or known).rpartition(".")[2] != known:
            problems.append(f"{table.name}._target_ is {given!r:.100}; known is {known}")
            return None
    found, values = dict(_flat(table, section, problems)), {}
    for row in table.rows:
        _read_row(table, row, found, values, problems)
    return values if len(problems) == before else None


def complete(cls, values, name, problems):
    """All fields of the settings class as a dict; None, and the reason in `problems`, if it refuses
    the values or there are none."""
    if values is None:
        return None
    try:
        return settings.to_dict(cls(**values))
    except REFUSALS as e:
        problems.append(f"{name}: {e}" if isinstance(e, ValueError) else f"{name}: {values} ({e})")
        return None


def _flat(table, section, problems, prefix=""):
    """(dotted key, value) of what rows ask for; what nothing asks for is a problem."""
    keys = {key for row in table.rows for key in row.keys}
    for key, value in section.items():
        at = f"{prefix}{key}"
        if at in keys:
            yield at, value
        elif any(known.startswith(f"{at}.") for known in keys):
            if isinstance(value, Mapping):
                yield from _flat(table, value, problems, f"{at}.")
            elif value is not None:
                problems.append(f"{_place(table, at)} is {value!r:.100}, not a mapping")
        elif not _changes_nothing(table, key, at, value):
            problems.append(f"{_place(table, at)} is {value!r:.100}, which is not known here")


def _changes_nothing(table, key, at, value):
    if at in table.only_as or at in table.always:
        return value in table.only_as.get(at, ()) or value in [table.always.get(at, UNSAID)]
    known = table.is_open or key in table.silent or at in table.also
    return known or (at == "_target_" and bool(table.target))


def _place(table, key):
    return f"{table.name}.{key}" if table.name else key


def _read_row(table, row, found, values, problems):
    single = not isinstance(row.key, tuple)
    given = [found.get(key, UNSAID) for key in row.keys]
    usual = [row.usual] if single else row.usual
    said = [u if value is UNSAID else value for value, u in zip(given, usual, strict=True)]
    if any(value is MUST for value in said):
        problems.append(f"{_place(table, row.key)} is missing")
        return
    theirs = said[0] if single else tuple(said)
    if theirs is UNSAID:
        return
    shown = [
        f"{_place(table, k)} is {v!r:.100}" for k, v in zip(row.keys, given) if v is not UNSAID
    ]
    shown = ", ".join(shown) or f"{_place(table, row.keys[0])} is {theirs!r:.100} by default"
    try:
        value = _converted(row.read, theirs, values)
    except KeyError:  # of a field that this one needs and that is a problem itself
        return
    except REFUSALS as e:
        why = e if isinstance(e, ValueError) else f"which it cannot be ({e})"
        problems.append(f"{shown}, {why}")
        return
    kinds, rules = _kinds_and_rules(table, row)
    if value is None and type(None) not in kinds and table.none_is_usual:
        value = row.usual
    if value is UNSAID:
        return
    fitted, made = (
        _fitted(value, kinds),
        "" if value is theirs else f" (which makes {value!r:.100})",
    )
    if fitted is UNSAID:
        words = " or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds)
        problems.append(f"{shown}{made}, not {words}")
    elif wanted := fitted is not None and settings.broken(fitted, rules):
        problems.append(f"{shown}{made}, must be {wanted}")
    elif row.wins:
        values[row.field] = fitted
    elif values.setdefault(row.field, fitted) != fitted:
        problems.append(f"{shown}, where another key says {values[row.field]!r:.100}")


def _converted(way, value, values):
    if callable(way):
        return way(value, values)
    same = (new for old, new in way.items() if type(old) is type(value) and old == value)
    return next(same, value)


@functools.cache
def _fields(cls):
    """{field: (type, rules)} of a settings class."""
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], f.metadata) for f in dataclasses.fields(cls)}


def _kinds_and_rules(table, row):
    """The types that a row's value may have, which are its field's, or where we have none its
    default's, and its rules."""
    section, _, name = row.field.rpartition(".")
    cls = table.cls.get(section) if isinstance(table.cls, Mapping) else table.cls
    hint, rules = (_fields(cls) if cls else {}).get(name, (type(row.usual), {}))
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if union else [hint]
    return [typing.get_origin(kind) or kind for kind in kinds], {**rules, **row.rules}


def _fitted(value, kinds):
    """The value as one of the types (lists become tuples, 1 is a number, 2.0 an integer), or UNSAID
    if it is of none, not finite or beyond LARGEST."""
    if isinstance(value, list | tuple):
        items = tuple(_fitted(item, (int, float, tuple)) for item in value)
        return items if tuple in kinds and UNSAID not in items else UNSAID
    if isinstance(value, int | float) and not isinstance(value, bool):
        if int in kinds and abs(value) <= LARGEST[int] and value == int(value):
            return int(value)
        return float(value) if float in kinds and abs(value) <= LARGEST[float] else UNSAID
    return value if type(value) in kinds else UNSAID


# ---- writing -------------------------------------------------------------------------------------


def write(table, values, base=None):
    """The section of our values, merged into `base`, what the file had. Fields that `values` lacks
    are not written."""
    base, new = base or {}, {}
    if table.target:
        new["_target_"] = table.target
    for key, value in {**table.always, **table.also}.items():
        if not _has(base, key.split(".")):
            _put(new, key.split("."), value)
    for row in table.rows:
        if row.write is None or row.field not in values:
            continue
        theirs = _converted(row.write, values[row.field], values)
        for key, value in zip(row.keys, theirs if isinstance(row.key, tuple) else (theirs,)):
            if value is not UNSAID:
                _put(new, key.split("."), _lists(value))
    return merge(base, new)


def merge(base, new):
    """`new` over `base`, section by section."""
    result = dict(base)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        result[key] = merge(base[key], value) if both else value
    return result


def _has(section, path):
    for key in path:
        if not isinstance(section, Mapping) or key not in section:
            return False
        section = section[key]
    return True


def _put(section, path, value):
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = value


def _lists(value):
    return list(map(_lists, value)) if isinstance(value, tuple) else value
