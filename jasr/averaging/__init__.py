"""Averages of checkpoints."""

from jasr.averaging.mean import AverageError, average, normalised
from jasr.averaging.members import (
    PROVENANCE,
    Member,
    best_of,
    check_once,
    find_members,
    is_last,
    member,
    parse_name,
    select,
    weigh,
)
from jasr.averaging.steps import average_checkpoints

__all__ = [
    "AverageError",
    "Member",
    "PROVENANCE",
    "average",
    "average_checkpoints",
    "best_of",
    "check_once",
    "find_members",
    "is_last",
    "member",
    "normalised",
    "parse_name",
    "select",
    "weigh",
]
