"""Recordings as arrays, log-mel frames, augmentation, resampling."""

from jasr.audio.augment import (
    SpecAugmentConfig,
    WaveAugmentConfig,
    augment_waveform,
    row_keys,
    spec_augment,
    speed,
)
from jasr.audio.features import HTK, NEMO, FrontEndConfig, log_mel
from jasr.audio.files import AudioError, info, read, read_blocks
