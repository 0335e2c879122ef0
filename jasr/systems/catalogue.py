"""The systems by name: strings, imported when somebody asks for one.

A further system is one folder and one line here. Names of earlier revisions are read, too.
"""

import difflib
import importlib

SYSTEMS = {
    "lact": "jasr.systems.lact:SYSTEM",
    "fastconformer": "jasr.systems.fastconformer:SYSTEM",
}


AUDIO = {  # the sections of systems that hear log-mel frames
    "front_end": "jasr.audio:FrontEndConfig",
    "spec_augment": "jasr.audio:SpecAugmentConfig",
    "wave_augment": "jasr.audio:WaveAugmentConfig",
}


def resolve(place):
    """What "package.module:name" names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def every():
    """The seam.System of every row."""
    return [resolve(place) for place in SYSTEMS.values()]


def get(name):
    """The seam.System of a name, today's or an old one.

    Raises:
      ValueError: no system has it; the error lists those there are.
    """
    if (known := today(name)) in SYSTEMS:
        return resolve(SYSTEMS[known])
    near = difflib.get_close_matches(str(name), SYSTEMS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"config.task {name!r} is not known; choose from {sorted(SYSTEMS)}{hint}")


def today(name):
    """The present name of a system; a name that nobody knows as it is."""
    return next((s.name for s in every() if name in (s.name, *s.old_names)), name)


def sections(system):
    """{config section: settings dataclass} of a System."""
    return {name: resolve(place) for name, place in system.sections.items()}


def _flags(verb):
    """(system, its flags {name: seam.Flag} of a command) of every system."""
    return [(s, s.options[verb].flags if verb in s.options else {}) for s in every()]


def add_options(parser, verb):
    """Adds the options that systems have for a command to an argparse parser, a group each."""
    taken = set()
    for system, flags in _flags(verb):
        group = parser.add_argument_group(f"options of {system.name} models")
        for name in [name for name in flags if name not in taken]:
            flag = flags[name]
            how = {"action": "store_true"} if flag.switch else {"choices": flag.choices or None}
            group.add_argument(f"--{name}", default="", help=flag.help, **how)
        taken.update(flags)


def given_options(args, verb):
    """{name: value} of the options that were given on a command line.

    Raises:
      ValueError: a value that an option cannot have.
    """
    flags = {name: flag for _, found in _flags(verb) for name, flag in found.items()}
    return {n: flag.parse(text) for n, flag in flags.items() if (text := getattr(args, n))}


def with_options(config, options, verb="transcribe"):
    """The config as options of its system change it.

    Args:
      config: a run's, as a plain mapping. options: {name: value}; empty values are not given.

    Raises:
      ValueError: an option that the system does not have, or a value that the model cannot have.
    """
    options = {name: value for name, value in options.items() if value not in ("", None, 0, ())}
    if not options:
        return config
    system, flags = get(config["task"]), {s.name: found for s, found in _flags(verb)}
    if unknown := [name for name in options if name not in flags[system.name]]:
        owners = [name for name, found in flags.items() if unknown[0] in found]
        of = f"options of {' and '.join(owners)} models" if owners else "no option of any model"
        raise ValueError(f"{', '.join(unknown)}: {of}; this one is of {system.name}")
    for dotted, value in system.options[verb].changes(config, options).items():
        config = _changed(config, dotted.split("."), value)
    return config


def _changed(config, keys, value):
    if not keys:
        return value
    return {**config, keys[0]: _changed(config.get(keys[0], {}), keys[1:], value)}
