"""`doctor data`: what a training run would make of data sources, without a run.

    python -m experiments.doctor data train.jsonl valid.jsonl [--quarantine bad.jsonl]

Decodes every recording, names each entry that cannot be used, and prints counts by reason,
durations, sampling rates, characters, and buckets with the padding that they would have. The exit
status is 0 only if there is no bad entry.
"""

import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from experiments import options

SETTINGS = "min_duration max_duration duration_tolerance num_buckets batch_duration".split()


def main(argv=None):
    """Prints the report; 0 if every entry can be used, else 1 (2: it cannot even be read)."""
    p = options.parser("doctor data", __doc__)
    p.add_argument("sources", nargs="+", help="manifests, CutSets or Shar directories")
    p.add_argument("--sample", type=int, default=0, help="decode so many, and headers of the rest")
    p.add_argument("--quarantine", default="", help="write the entries left out as JSON lines")
    p.add_argument("--alphabet", default="", help="characters allowed in texts (default: any)")
    p.add_argument("--min_duration", type=float, default=0.1, help="seconds")
    p.add_argument("--max_duration", type=float, default=40.0, help="seconds; 0 = any")
    p.add_argument("--duration_tolerance", type=float, default=0.1, help="manifest against file")
    p.add_argument("--seconds_per_frame", type=float, default=0.0, help="of a CTC model's output")
    p.add_argument("--num_buckets", type=int, default=4)
    p.add_argument("--batch_duration", type=float, default=120.0, help="padded seconds of a batch")
    p.add_argument("--show", type=int, default=10, help="bad entries to print")
    a = p.parse_args(argv)
    from jasr.data import AudioText, entries, index, plan
    from jasr.data.config import DataConfig, DataError
    from jasr.losses.ctc import frames_needed
    from jasr.text import BLANK, CharTokenizer

    cfg = {name: getattr(a, name) for name in SETTINGS}
    cfg = DataConfig(check="header", max_bad_share=1.0, **cfg)
    frames = frames_needed if a.seconds_per_frame else None
    encode = list  # one token a character
    if a.alphabet:
        encode = CharTokenizer((BLANK, *dict.fromkeys(a.alphabet))).encode
    layout = AudioText(cfg, 16000, encode, frames, a.seconds_per_frame)
    try:
        found = index.collect(a.sources, layout, cfg)
    except DataError as e:
        print(f"doctor data: {e}", file=sys.stderr)
        return 2
    found, facts = decode(found, a.sample, cfg)
    print(found.describe())
    if len(found):
        print("\n".join(describe(found, facts)))
        layout = layout.for_set(0.0, found.exact)
        buckets = plan.Plan(found, layout, cfg, seed=0)
        edges = [(round(n / cfg.sample_rate, 2), tokens) for _, n, tokens in buckets.shapes]
        print(f"suggested: bucket_duration_bins={tuple(edges)}")
        print(buckets.describe())
    if a.quarantine:
        entries.write_quarantine(a.quarantine, found.bad)
    bad = [b for b in found.bad if not b.filtered]
    for b in bad[: a.show]:
        print(f"bad {entries.named(b)}")
    if len(bad) > a.show:
        rest = f"all of them in {a.quarantine}" if a.quarantine else "--quarantine FILE lists all"
        print(f"... and {len(bad) - a.show} more; {rest}")
    filtered = len(found.bad) - len(bad)
    print(f"{len(found)} usable, {len(bad)} bad, {filtered} outside the limits")
    return 1 if bad or not len(found) else 0


def decode(index, sample, cfg):
    """(the index without what fails to decode, Counter of (kind, value) facts about the audio)."""
    from jasr import audio
    from jasr.data import index as index_lib
    from jasr.data import recording

    rows = np.arange(len(index))
    if 0 < sample < len(rows):
        rows = np.sort(np.random.default_rng(0).permutation(len(rows))[:sample])

    def look(row):
        try:
            [piece] = index.pieces_of(row)
            _, rate, channels = audio.info(recording.audio_file(piece))
            samples = recording.read_checked(piece, cfg.sample_rate, cfg.duration_tolerance)
        except audio.AudioError as e:
            return recording.reason_of(e)
        except OSError as e:
            return f"unreadable audio: {e.strerror or e}"
        return rate, channels, float(np.abs(samples).max(initial=0.0))

    ok, facts = np.ones(len(index), bool), Counter()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for row, found in zip(rows.tolist(), pool.map(look, rows.tolist()), strict=True):
            if isinstance(found, str):
                ok[row] = False
                index.bad.append(index.bad_row(row, found))
                continue
            rate, channels, peak = found
            facts["decoded", ""] += 1
            facts["rate", f"{rate} Hz"] += 1
            facts["channels", f"{channels} channel{'s' if channels > 1 else ''}"] += 1
            facts["silent", ""] += peak < 1e-4
            facts["clipped", ""] += peak >= 1.0
    return index_lib.take(index, ok), facts


def describe(index, facts):
    """Lines about durations, audio and texts."""
    seconds = np.sort(index.duration)
    quantiles = np.quantile(seconds, (0, 0.05, 0.5, 0.95, 1), method="lower")
    yield "seconds: least, 5 %, median, 95 %, most: " + ", ".join(f"{q:.2f}" for q in quantiles)
    yield from histogram(seconds)
    kinds = [f"{n} × {v}" for (k, v), n in sorted(facts.items()) if k in ("rate", "channels")]
    yield f"decoded {facts['decoded', '']}: " + ", ".join(kinds)
    for name in ("silent", "clipped"):
        if facts[name, ""]:
            yield f"  {facts[name, '']} of them {name}"
    characters, words = Counter(), Counter()
    for row in range(len(index)):
        characters.update(text := index.item(row).fields["text"])
        words.update(text.split())
    often = [c for c, _ in characters.most_common(120)]
    listed = " ".join(c if c.isprintable() and not c.isspace() else repr(c) for c in often)
    yield f"{len(characters)} characters, the most frequent first: {listed}"
    yield f"{sum(words.values())} words, {len(words)} different"


def histogram(seconds, bins=10, width=40):
    """Lines of a histogram of durations."""
    top = max(float(seconds.max()), 1e-3)
    counts, edges = np.histogram(seconds, bins=bins, range=(0.0, top))
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "#" * int(np.ceil(width * count / counts.max()))
        yield f"  {low:6.2f} to {high:6.2f} s {count:8d} {bar}"
