"""Recordings in memory as the audio of a batch."""

import numpy as np


def padded(recordings, rows, samples):
    """{"audio" f32[rows, samples], "audio_len" i32[rows]} of recordings f32[*], one a row; further
    rows are empty."""
    batch = {"audio": np.zeros((rows, samples), np.float32), "audio_len": np.zeros(rows, np.int32)}
    for row, recording in enumerate(recordings):
        batch["audio"][row, : len(recording)] = recording
        batch["audio_len"][row] = len(recording)
    return batch
