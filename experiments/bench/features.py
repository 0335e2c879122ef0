"""Row `features`: log-mel of a batch against transformers' ParakeetFeatureExtractor.

    python -m experiments.benchmark features [--batch 16] [--seconds 10] [--rounds 15] [--files ...]

Both get the same list of utterances of unequal length as numpy arrays and return padded features;
ours pads on the host, moves the batch and runs one jitted function. After the comparison each side
is timed, in turns with the other, in a process of its own. `--files` takes recordings in place of
generated speech-like noise. Two more rows time decoding and resampling.
"""

import argparse
import io
import sys

import numpy as np

from experiments.bench import timing


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmark features", description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="length of the longest utterance"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mels", type=int, default=80)
    parser.add_argument("--files", nargs="*", default=(), help="recordings to use as the batch")
    parser.add_argument("--serve", choices=("jasr", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    from jasr import audio

    if args.files:
        utterances = [audio.read(path) for path in args.files]
    else:
        utterances = speech_like(args.batch, args.seconds)
    sides = {"jasr": jasr_side, "transformers": transformers_side}
    if args.serve:
        return timing.serve(sides[args.serve](utterances, args.mels))
    print(timing.machine())
    compare(*(make(utterances, args.mels)() for make in sides.values()))
    log_mel_row(utterances, args)
    host_rows(utterances[0], args.rounds)


def speech_like(batch, seconds, seed=0):
    """Utterances f32[S] of unequal length: falling noise, four syllables a second."""
    rng = np.random.default_rng(seed)
    utterances = []
    for share in np.linspace(0.7, 1.0, batch):
        samples = int(share * seconds * 16000)
        noise = np.convolve(rng.standard_normal(samples), 0.9 ** np.arange(32), mode="same")
        syllables = np.maximum(0, np.sin(np.arange(samples) * (2 * np.pi * 4 / 16000))) ** 2
        utterances.append((0.05 * noise * syllables).astype(np.float32))
    return utterances


def pad(utterances):
    """(audio f32[B, S], audio_len i32[B])."""
    lengths = np.array([len(x) for x in utterances], np.int32)
    batch = np.zeros((len(utterances), lengths.max()), np.float32)
    for row, x in zip(batch, utterances, strict=True):
        row[: len(x)] = x
    return batch, lengths


def jasr_side(utterances, mels):
    """Thunk -> features f32[B, T, F]."""
    import jax

    from jasr import audio

    config = audio.FrontEndConfig(n_mels=mels)
    function = jax.jit(lambda x, n: audio.log_mel(x, n, config)[0])
    return lambda: jax.block_until_ready(function(*pad(utterances)))


def transformers_side(utterances, mels):
    """Thunk -> features f32[B, T, F]."""
    import torch
    from transformers import ParakeetFeatureExtractor

    torch.set_num_threads(timing.threads())
    extract = ParakeetFeatureExtractor(feature_size=mels)
    return lambda: extract(utterances, sampling_rate=16000, return_tensors="pt")["input_features"]


def compare(ours, theirs):
    """Prints the largest difference; raises where the two are not the same features."""
    worst = float(np.abs(np.asarray(ours) - theirs.numpy()).max())
    print(f"largest difference of the outputs {worst:.1e}")
    if worst > 1e-3:
        raise SystemExit("nothing to time")


def log_mel_row(utterances, args):
    """Times and reports; the ratio of the medians is the result."""
    options = [f"--{name}={getattr(args, name)}" for name in ("batch", "seconds", "mels")]
    options += ["--files", *args.files] if args.files else []
    line = [sys.executable, "-m", "experiments.bench.features", *options]
    sides = ("transformers", "jasr")
    times = timing.in_turns({side: [*line, f"--serve={side}"] for side in sides}, args.rounds)
    seconds = sum(map(len, utterances)) / 16000
    speeds = {name: seconds / timing.quartiles(values)[1] for name, values in times.items()}
    return timing.report(
        f"log-mel, {len(utterances)} utterances, {seconds:.0f} s, {args.mels} mels, "
        f"{timing.threads()} threads",
        times,
        ours="jasr",
        peer="transformers",
        extra=[f"{name}: {speed:.0f}x real time" for name, speed in speeds.items()],
    )


def host_rows(x, rounds):
    """Decoding of one utterance in each format, resampling and speed perturbation, on the host."""
    import scipy.signal
    import soundfile

    from jasr import audio
    from jasr.audio.resample import resample

    coded = {}
    for name, kind in {"wav": "WAV", "flac": "FLAC", "ogg": "OGG", "mp3": "MP3"}.items():
        stream = io.BytesIO()
        soundfile.write(stream, x, 16000, format=kind)
        coded[name] = stream.getvalue()
    seconds = len(x) / 16000
    thunks = {name: (lambda data=data: audio.read(data)) for name, data in coded.items()}
    times = timing.interleave(thunks, rounds)
    speeds = {name: seconds / timing.quartiles(values)[1] for name, values in times.items()}
    extra = [f"{name}: {speed:.0f}x real time" for name, speed in speeds.items()]
    timing.report("read, one utterance", times, ours="flac", extra=extra)

    x = resample(x, 16000, 44100)
    times = timing.interleave(
        {
            "scipy resample_poly": lambda: scipy.signal.resample_poly(x, 160, 441),
            "jasr": lambda: resample(x, 44100, 16000),
        },
        rounds,
    )
    timing.report("resample 44.1 to 16 kHz", times, ours="jasr", peer="scipy resample_poly")
    x = x[: int(seconds * 16000)]
    times = timing.interleave({"speed 1.1": lambda: audio.speed(x, 1.1)}, rounds)
    speed = seconds / timing.quartiles(times["speed 1.1"])[1]
    timing.report("speed", times, ours="speed 1.1", extra=[f"{speed:.0f}x real time"])


if __name__ == "__main__":
    main()
