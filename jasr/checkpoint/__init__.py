"""Checkpoints on disk: saved atomically with checksums, verified when read, readable anywhere."""

from jasr.checkpoint.files import (
    MANIFEST,
    CheckpointError,
    find_step,
    find_steps,
    items,
    load_metrics,
    verify,
)
from jasr.checkpoint.read import leaves, load_meta, load_params
from jasr.checkpoint.steps import CheckpointConfig, Checkpoints
from jasr.checkpoint.write import save_step

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Checkpoints",
    "MANIFEST",
    "find_step",
    "find_steps",
    "items",
    "leaves",
    "load_meta",
    "load_metrics",
    "load_params",
    "save_step",
    "verify",
]
