"""Settings dataclasses built from plain mappings, with errors that name the key."""

import dataclasses
import difflib
import json
import operator


class SettingsError(ValueError):
    """A config key is misspelt, or has a value of the wrong kind or beyond its limits."""


class RecipeError(Exception):
    """Another toolkit's recipe cannot be followed.

    No ValueError: of these, met in a config file, absl prints the traceback.
    """


_LIMITS = {
    "least": ("at least", operator.ge),
    "most": ("at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


def section(cls):
    """A frozen dataclass of settings whose fields are checked whenever one is made.

    What two fields say together stays in its `__post_init__`, which comes after that.
    """
    together = cls.__dict__.get("__post_init__", lambda self: None)

    def checked(self):
        for item in dataclasses.fields(self):
            _check_value(item, getattr(self, item.name), f"{cls.__name__}.{item.name}")
        together(self)

    cls.__post_init__ = checked
    return dataclasses.dataclass(frozen=True)(cls)


def field(default=dataclasses.MISSING, *, choices=None, meaning=None, **limits):
    """A field of a `section` with what its values may be.

    Args:
      default: its value where nothing is said.
      choices: the values that it may have.
      meaning: whether the field decides what trained weights mean; a function of the settings that
        says so; None: as the section that it stands in.
      limits: least, most, above, below: of a number (of each, for a sequence of numbers). A default
        of None may be kept.
    """
    if unknown := limits.keys() - _LIMITS:
        raise TypeError(f"no limits of a field: {unknown}")
    rules = limits if choices is None else {**limits, "choices": choices}
    return dataclasses.field(default=default, metadata={**rules, "meaning": meaning})


def _check_value(item, value, where):
    kept = value is None and item.default is None and "choices" not in item.metadata
    if not kept and (wanted := broken(value, item.metadata)):
        raise SettingsError(f"{where} must be {wanted}, got {value!r}")


def broken(value, rules):
    """What a value must be by the rules of `field`, in words; "" if it is."""
    choices = rules.get("choices")
    if choices is not None and value not in choices:
        return f"one of {', '.join(map(repr, choices))}"
    limits = [(*_LIMITS[name], rules[name]) for name in _LIMITS if name in rules]
    for number in value if isinstance(value, tuple) else (value,):
        known = isinstance(number, int | float)
        if limits and not (known and all(holds(number, limit) for _, holds, limit in limits)):
            return " and ".join(f"{words} {limit}" for words, _, limit in limits)
    return ""


def meaningful(values, where, default):
    """Yields ("model.encoder.d_model", value) of the fields that decide what weights mean.

    default: whether those do that say nothing of it; fields that are settings themselves are looked
      into, and say it of theirs.
    """
    for item in dataclasses.fields(values):
        if not item.init:
            continue
        value, name = getattr(values, item.name), f"{where}.{item.name}"
        meaning = item.metadata.get("meaning")
        decides = default if meaning is None else meaning
        if callable(decides):
            decides = decides(values)
        if dataclasses.is_dataclass(value):
            yield from meaningful(value, name, decides)
        elif decides:
            yield name, value


def _convert(value, default, where):
    """`value` in the type of `default`; JSON lists become tuples, ints pass as floats."""
    if isinstance(default, tuple):
        if isinstance(value, (list, tuple)):
            return tuple(tuple(v) if isinstance(v, list) else v for v in value)
        raise SettingsError(f"{where} must be a sequence, got {value!r}")
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise SettingsError(f"{where} must be True or False, got {value!r}")
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    if default is not None and (isinstance(value, bool) or not isinstance(value, type(default))):
        raise SettingsError(
            f"{where} must be {type(default).__name__}, got {type(value).__name__} {value!r}"
        )
    return value


def build(cls, mapping, where="config", base=None):
    """An instance of the settings dataclass `cls` from a plain mapping.

    Fields that the mapping lacks keep their defaults; nested settings dataclasses are built from
    nested mappings.

    Args:
      cls: a dataclass whose fields all have defaults.
      mapping: dict or ConfigDict of field name -> value, or an instance of `cls`.
      where: the config path used in errors, e.g. "config.model".
      base: an instance whose values are the defaults, in place of the class's own.

    Raises:
      SettingsError: an unknown key (with the nearest known one), a value of another type or one
        beyond the limits of its field.
    """
    if isinstance(mapping, cls):
        return mapping
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    values = {}
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {sorted(fields)}"
            raise SettingsError(f"{where}.{key} is not a field of {cls.__name__}{hint}")
        field = fields[key]
        default = field.default if base is None else getattr(base, key)
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default):
            values[key] = build(type(default), mapping[key], f"{where}.{key}", default)
        else:
            values[key] = _convert(mapping[key], default, f"{where}.{key}")
            _check_value(field, values[key], f"{where}.{key}")
    return cls(**values) if base is None else dataclasses.replace(base, **values)


def plain(config):
    """A run's config, a ConfigDict or a dict, as a plain dict."""
    return config if isinstance(config, dict) else json.loads(config.to_json())


def to_dict(settings):
    """A settings dataclass as a plain nested dict (tuples kept)."""
    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v := getattr(settings, f.name)) else v
        for f in dataclasses.fields(settings)
        if f.init
    }
