"""How two configs differ in the settings that decide what weights mean.

Asked wherever weights meet a config that is not their own: at resume, at `config.init.path`, when
checkpoints are averaged. Tokenizers are compared beside it. Which fields matter is said at the
fields (`settings.field`); by default those of the sections in MATTER do.
"""

from jasr import settings
from jasr.systems import catalogue

MATTER = ("model", "front_end")


def differences(theirs, ours):
    """{"model.rope_theta": (their value, our value), ...} of two runs' configs.

    A field that a config lacks has its default: it was saved before there was the field.

    Args:
      theirs, ours: mappings with "task" and the sections of that system.

    Raises:
      settings.SettingsError: a field that is not known.
    """
    names = tuple(catalogue.today(c.get("task") or "lact") for c in (theirs, ours))
    if names[0] != names[1]:
        return {"task": names}
    found = {}
    for section, cls in catalogue.sections(catalogue.get(names[0])).items():
        found |= section_differences(
            cls, *(c.get(section, {}) for c in (theirs, ours)), section, section in MATTER
        )
    return found


def section_differences(cls, theirs, ours, where, default=True):
    """`differences` of one section, whatever systems its two mappings come from.

    Args:
      cls: the section's settings dataclass. where: its name, "model.encoder".
      default: whether fields matter that say nothing of it.
    """
    old, new = (
        dict(settings.meaningful(settings.build(cls, c, f"config.{where}"), where, default))
        for c in (theirs, ours)
    )
    absent = object()
    pairs = {name: (old.get(name, absent), new.get(name, absent)) for name in {**old, **new}}
    return {name: pair for name, pair in pairs.items() if absent not in pair and pair[0] != pair[1]}


def listed(changes):
    """The differences in one line."""
    return ", ".join(f"{name} ({old!s:.60} -> {new!s:.60})" for name, (old, new) in changes.items())
