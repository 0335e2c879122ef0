"""The data loader: audio-seconds a second cold and cached, by threads; padding; cost of resuming.

    python -m experiments.benchmark loader [--manifest=train.jsonl --rounds=5 --threads 0 1 2 4]
    python -m experiments.benchmark loader --rows=1000000        index and plan of so many rows

Without a manifest, a corpus of so many FLAC files is made (noise shaped like speech, 1 to 12 s).
The peer is lhotse where it is installed: DynamicBucketingSampler, recordings read and padded by
lhotse's collation, in this process, over the same files, with the same seconds of audio in a batch;
all sides without threads first. Files are in the page cache for both.
"""

import dataclasses
import json
import pathlib
import tempfile
import time
import warnings

import numpy as np

from experiments.bench import timing


def main(argv=None):
    parser = timing.parser("loader", __doc__, utterances=400, rounds=5, rows=0)
    parser.add_argument("--manifest", default="", help="default: a corpus made for the purpose")
    parser.add_argument("--threads", type=int, nargs="*", default=[0, 1, 2, 4])
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        print(timing.machine())
        if args.rows:
            many_rows(folder, args.rows)
        else:
            manifest = args.manifest or make_corpus(folder, args.utterances)
            throughput(manifest, args)
            resuming(manifest)


def encode(text):
    """One token a character."""
    return [1] * len(text)


def make_corpus(folder, count):
    """The manifest of `count` FLAC files, which compress about as speech does."""
    import soundfile

    from experiments.prepare.manifest import write_manifest

    rng, entries = np.random.default_rng(0), []
    for i in range(count):
        seconds = float(np.clip(rng.gamma(4.0, 1.2), 1.0, 12.0))
        x = np.cumsum(rng.standard_normal(int(seconds * 16000))) % 7 - 3.5
        x *= np.repeat(rng.uniform(0, 1, len(x) // 1600 + 1), 1600)[: len(x)]
        soundfile.write(folder / f"{i}.flac", 0.05 * x, 16000)
        entry = {"audio_filepath": f"{i}.flac", "duration": len(x) / 16000}
        entries.append(entry | {"text": "x" * max(1, int(14 * seconds))})
    return write_manifest(folder / "corpus.jsonl", entries)


def opened(manifest, **change):
    from jasr import data

    cfg = data.DataConfig(train=(str(manifest),), batch_duration=200.0, check="none")
    cfg = dataclasses.replace(cfg, **change)
    return data.open_train(cfg, data.AudioText(cfg, 16000, encode), seed=0)


def one_epoch(train, start=0):
    """Reads the batches of one epoch from position `start` on."""
    stream = train.iterate(start)
    for _ in range(len(train.plan.epoch(0).bucket)):
        next(stream)
    stream.close()


def throughput(manifest, args):
    index_start = time.perf_counter()
    first = opened(manifest)
    index_seconds = time.perf_counter() - index_start
    seconds = float(first.index.duration.sum())
    print(first.describe())
    print(f"index, buckets and plan: {1e3 * index_seconds:.0f} ms")
    plain = {n: opened(manifest, cache_audio=False, num_threads=n) for n in args.threads}
    peer, alone = lhotse_epoch(manifest, first), next(iter(plain.values()))
    for name, epoch in (("jasr", lambda: one_epoch(alone)), ("lhotse", peer)):
        if epoch:
            epoch()
            cpu = time.process_time()
            epoch()
            cpu = time.process_time() - cpu
            print(f"decoding, {name}: {seconds / cpu:,.0f} audio-seconds a second of CPU time")
    thunks = {f"decoding, {n} threads": lambda t=t: one_epoch(t) for n, t in plain.items()}
    if peer:
        thunks["lhotse, 0 threads"] = peer
    show("an epoch, decoded anew", thunks, seconds, args, peer and "lhotse, 0 threads")
    speeds = {"speeds": (0.9, 1.0, 1.1), "cache_mb": 1 << 20}
    warm = {n: opened(manifest, num_threads=n, **speeds) for n in args.threads}
    for train in warm.values():
        fill(train)
    thunks = {f"cached, {n} threads": lambda t=t: one_epoch(t) for n, t in warm.items()}
    show("an epoch at three speeds, cached", thunks, seconds, args)


def fill(train):
    """Decodes and stretches everything into the cache."""
    for row in range(len(train.index)):
        for speed in train.cfg.speeds:
            train.layout.pcm(train.index.pieces_of(row), speed)


def show(title, thunks, seconds, args, peer=None):
    times = timing.interleave(thunks, args.rounds)
    extra = timing.speeds(times, seconds)
    timing.report(title, times, ours=next(iter(thunks)), peer=peer, extra=extra)


def lhotse_epoch(manifest, train):
    """A function that reads one epoch with lhotse, or None where it is not installed.

    The first recordings are compared with those of `train`.
    """
    try:
        from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
        from lhotse.dataset import DynamicBucketingSampler
        from lhotse.dataset.collation import collate_audio
    except ImportError:
        print("lhotse is not installed: no peer")
        return None
    base, cuts = pathlib.Path(manifest).parent, []
    for line in open(manifest, encoding="utf-8"):
        entry = json.loads(line)
        recording = Recording.from_file(base / entry["audio_filepath"])
        spoken = SupervisionSegment(recording.id, recording.id, 0.0, recording.duration, 0)
        spoken.text = entry["text"]
        cut = MonoCut(recording.id, 0.0, recording.duration, 0, [spoken], recording=recording)
        cuts.append(cut.resample(16000) if recording.sampling_rate != 16000 else cut)
    for row, cut in enumerate(cuts[:5]):
        ours = train.layout.pcm(train.index.pieces_of(row)) * np.float32(2**-15)
        if cut.recording.sampling_rate == 16000 and not cut.recording.transforms:
            assert np.array_equal(cut.load_audio()[0], ours), f"lhotse reads {cut.id} differently"
    cuts = CutSet.from_cuts(cuts)
    warnings.filterwarnings("ignore", message=".*eagerly read CutSet.*")

    def epoch():
        sampler = DynamicBucketingSampler(cuts, max_duration=200.0, num_buckets=4, shuffle=True)
        for batch in sampler:
            audio, _ = collate_audio(batch)
            audio.numpy()
            [encode(s.text) for cut in batch for s in cut.supervisions]

    return epoch


def resuming(manifest):
    """Prints the seconds from nothing to the first batch, at the start and far into training."""
    for position in (0, 1000, 100_000):
        train = opened(manifest, num_threads=0, speeds=(0.9, 1.0, 1.1))
        start = time.perf_counter()
        epoch = train.epoch_of(position)
        next(train.iterate(position))
        spent = time.perf_counter() - start
        print(f"  batch {position:>7,} (epoch {epoch}) after {1e3 * spent:7.1f} ms")


def many_rows(folder, count):
    """Prints the time and memory of index and plan of a manifest of `count` rows."""
    from experiments.prepare.manifest import write_manifest

    rng = np.random.default_rng(0)
    durations = rng.gamma(4.0, 2.5, count).clip(1, 30).round(3).tolist()
    entries = (
        {
            "audio_filepath": f"part-{i % 1000:03d}/utterance-{i:09d}.flac",
            "duration": seconds,
            "text": "some words that were said " * int(seconds / 2),
        }
        for i, seconds in enumerate(durations)
    )
    manifest = write_manifest(folder / "m.jsonl", entries)
    before, start = timing.resident("VmHWM"), time.perf_counter()
    train = opened(manifest)
    spent = time.perf_counter() - start
    plan = train.plan
    grown = (timing.resident("VmHWM") - before) / 2**30
    print(f"index, buckets and first plan of {count:,} rows: {spent:.1f} s, {grown:.2f} GiB")
    print(train.describe())
    for name, call in {
        "another epoch": lambda: plan.epoch(7),
        "batch 1,000,000,000": lambda: plan.batch(10**9),
    }.items():
        start = time.perf_counter()
        call()
        print(f"{name}: {time.perf_counter() - start:.2f} s")
