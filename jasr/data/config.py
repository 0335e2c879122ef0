"""The settings of training and validation data."""

import dataclasses


class DataError(ValueError):
    """Data cannot be used: a missing source, too many bad entries, impossible settings."""


class LengthError(DataError):
    """An item cannot be used for its length, which the file may correct.

    filtered: for a setting, not for a defect.
    """

    def __init__(self, reason, filtered=True):
        super().__init__(reason)
        self.filtered = filtered


class ItemError(DataError):
    """Item `number` of those that a row should hold cannot be read."""

    def __init__(self, number, reason):
        super().__init__(reason)
        self.number = number


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained and validated on, and how utterances are put into batches.

    Sources are NeMo manifests (JSON lines), lhotse CutSets (`.jsonl`, `.jsonl.gz`) or Shar
    directories; a source may be a pair [path, weight]. Times are seconds.
    """

    train: tuple = ()
    valid: tuple = ()
    sample_rate: int = 16000
    # which utterances are used for training; 0 for a maximum = no limit
    min_duration: float = 0.1
    max_duration: float = 40.0
    min_tokens: int = 1  # 0 also admits empty texts
    max_tokens: int = 0
    # what is looked at before the first step, and how much may be bad
    check: str = "auto"  # "none", "files" exist, "header" is read, "decode" all; "auto" by size
    duration_tolerance: float = 0.1  # between manifest and file
    max_bad_share: float = 0.05
    # buckets: estimated from the data, or upper edges in seconds or (seconds, tokens); of other
    # layouts, in the numbers that their `sizes` gives
    num_buckets: int = 4
    bucket_duration_bins: tuple = ()
    bucket_batch_size: tuple = ()  # rows of each bucket, or one number for all
    batch_duration: float = 120.0  # else: padded seconds in one global batch
    batch_cost: float = 0.0  # or, for any layout, what its rows cost together; 0 = batch_duration
    batch_multiple: int = 1  # rows of a global batch are a multiple of it (devices)
    # samples; edges are rounded up to one below a multiple, so that 1 + n // hop frames are round
    length_multiple: int = 1280
    token_multiple: int = 8  # of the sizes after the first
    # variety
    speeds: tuple = (1.0,)
    concat: int = 1  # at most so many utterances share a row
    concat_share: float = 1.0  # share of the utterances that may be joined
    concat_duration: float = 0.0  # rows are joined up to this length; 0 = the longest utterance's
    concat_gap: tuple = (0.1, 0.4)  # silence between them, drawn uniformly
    # the loader
    cache_audio: bool = True
    cache_mb: int = 2048  # larger sets are decoded anew each time
    num_threads: int = 2
    prefetch: int = 8  # batches
