"""Averages of checkpoints."""

from jasr.averaging.mean import (
    PROVENANCE,
    AverageError,
    Member,
    average,
    average_checkpoints,
    check_duplicates,
    check_once,
    find_members,
    is_last,
    member,
    normalised,
    parse_name,
    select,
    weigh,
)

__all__ = [
    "AverageError",
    "Member",
    "PROVENANCE",
    "average",
    "average_checkpoints",
    "check_duplicates",
    "check_once",
    "find_members",
    "is_last",
    "member",
    "normalised",
    "parse_name",
    "select",
    "weigh",
]
