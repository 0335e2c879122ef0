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


def add_options(parser, verb):
    """Adds the options that systems have for a command to an argparse parser, a group each."""
    taken = set()
    for system in every():
        options = system.options.get(verb)
        group = parser.add_argument_group(f"options of {system.name} models")
        for name, flag in options.flags.items() if options else ():
            if name not in taken:
                how = {"choices": flag.choices or None}
                how = {"action": "store_true"} if flag.switch else how
                group.add_argument(f"--{name}", default="", help=flag.help, **how)
            taken.add(name)


def given_options(args, verb):
    """{name: value} of the options that were given on a command line.

    Raises:
      ValueError: a value that an option cannot have.
    """
    found = {}
    for system in every():
        options = system.options.get(verb)
        for name, flag in options.flags.items() if options else ():
            if text := getattr(args, name):
                found[name] = flag.parse(text)
    return found


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
    system = get(config["task"])
    own = system.options.get(verb)
    unknown = [name for name in options if not own or name not in own.flags]
    if unknown:
        owners = [
            s.name for s in every() if verb in s.options and unknown[0] in s.options[verb].flags
        ]
        of = f"options of {' and '.join(owners)} models" if owners else "no option of any model"
        raise ValueError(f"{', '.join(unknown)}: {of}; this one is of {system.name}")
    for dotted, value in own.changes(config, options).items():
        config = _changed(config, dotted.split("."), value)
    return config


def _changed(config, keys, value):
    if not keys:
        return value
    return {**config, keys[0]: _changed(config.get(keys[0], {}), keys[1:], value)}
