"""Settings dataclasses built from plain mappings, with errors that name the key."""

import dataclasses
import difflib


class SettingsError(ValueError):
    """A config key is misspelt or has a value of the wrong kind."""


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
      SettingsError: an unknown key (with the nearest known one) or a value of another type.
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
    return cls(**values) if base is None else dataclasses.replace(base, **values)


def to_dict(settings):
    """A settings dataclass as a plain nested dict (tuples kept)."""
    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v := getattr(settings, f.name)) else v
        for f in dataclasses.fields(settings)
        if f.init
    }
