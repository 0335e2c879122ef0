"""What of a recording was heard: the stretches that were decoded, and loud ones without words."""

import numpy as np

LEVEL_SECONDS = 0.02  # loudness is measured on frames of this length
SILENT_DB, SOUND_DB = -60.0, -50.0  # of full scale: nothing there; something there
HOLE_SECONDS, HOLE_DB = 4.0, 12.0  # a wordless span so long, at most so much below the words


def coverage(spans, seconds):
    """How much of a recording was decoded.

    Args:
      spans: [(start, end)] in s that the windows decoded.
      seconds: of the recording.

    Returns:
      {"windows": their number, "seconds": decoded, "uncovered": [[start, end] in s]}; edges of at
      most LEVEL_SECONDS, less than a frame of features, count as decoded beside what was.
    """
    gaps, reached = [], 0.0
    for start, end in [*sorted(span for span in spans if span[1] > span[0]), (seconds, seconds)]:
        if start - reached > (LEVEL_SECONDS if reached or start < seconds else 0.0):
            gaps.append([round(reached, 4), round(start, 4)])
        reached = max(reached, end)
    missing = sum(end - start for start, end in gaps)
    decoded = max(0.0, round(seconds - missing, 4))
    return {"windows": len(spans), "seconds": decoded, "uncovered": gaps}


def doubts(found, levels, seconds):
    """Warnings about a transcript: no words at all, words in silence, or long stretches as loud as
    words without any.

    Args:
      found: words with start and end; levels: f32[N] dB of full scale every LEVEL_SECONDS.
    """
    peak = float(levels.max(initial=-120.0))
    if not found:
        if peak < SILENT_DB:
            return [f"no words found: the recording is silent (peak {peak:.0f} dBFS)"]
        loud = LEVEL_SECONDS * int(np.sum(levels > SOUND_DB))
        return [f"no words found although {loud:.1f} s of it are above {SOUND_DB:g} dBFS"]
    if peak < SILENT_DB:
        return [f"words found although the recording is silent (peak {peak:.0f} dBFS)"]
    times = (np.arange(len(levels)) + 0.5) * LEVEL_SECONDS
    edges = np.array([[w["start"], w["end"]] for w in found])
    number = np.searchsorted(edges[:, 0], times) - 1  # the last word begun
    inside = (number >= 0) & (times < edges[np.maximum(number, 0), 1])
    if not inside.any():
        return []
    loud = levels > max(SILENT_DB, np.quantile(levels[inside], 0.75) - HOLE_DB)
    gaps = zip([0.0, *edges[:, 1]], [*edges[:, 0], seconds], strict=True)
    return [
        f"no words between {start:.1f} and {end:.1f} s although it is about as loud as the words"
        for start, end in gaps
        if end - start > HOLE_SECONDS and np.mean(loud[(times >= start) & (times < end)]) > 0.5
    ]
