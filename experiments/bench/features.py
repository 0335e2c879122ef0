"""Row `features`: log-mel of a batch against transformers' ParakeetFeatureExtractor.

    python -m experiments.benchmark features [--batch 16] [--seconds 10] [--rounds 15] [--files ...]

Both get the same list of utterances of unequal length as numpy arrays and return padded features;
ours pads on the host, moves the batch and runs one jitted function. After the comparison each side
is timed, in turns with the other, in a process of its own. `--seconds` is the longest utterance's
length; `--files` takes recordings in place of generated speech-like noise.
"""

import numpy as np

from experiments.bench import timing


def main(argv=None):
    numbers = dict(batch=16, seconds=10.0, rounds=15, mels=80)
    parser = timing.parser("features", __doc__, **numbers)
    parser.add_argument("--files", nargs="*", default=(), help="recordings to use as the batch")
    args = parser.parse_args(argv)
    print(timing.machine())
    sides = {"transformers": transformers_side, "jasr": jasr_side}
    theirs, ours = (np.asarray(side(args)()) for side in sides.values())
    worst = float(np.abs(ours - theirs).max())
    print(f"largest difference of the outputs {worst:.1e}")
    if worst > 1e-3:
        raise SystemExit("nothing to time")
    lines = {name: timing.served(side, args) for name, side in sides.items()}
    times = timing.in_turns(lines, args.rounds)
    utterances = heard(args)
    seconds = sum(map(len, utterances)) / 16000
    title = f"log-mel, {len(utterances)} utterances, {seconds:.0f} s, {args.mels} mels"
    title += f", {timing.threads()} threads"
    extra = timing.speeds(times, seconds)
    timing.report(title, times, ours="jasr", peer="transformers", extra=extra)


def heard(args):
    """Utterances f32[S]: those of the files, or falling noise with four syllables a second."""
    from jasr import audio

    if args.files:
        return [audio.read(path) for path in args.files]
    rng, utterances = np.random.default_rng(0), []
    for share in np.linspace(0.7, 1.0, args.batch):
        samples = int(share * args.seconds * 16000)
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


def jasr_side(args):
    """Thunk -> features f32[B, T, F]."""
    import jax

    from jasr import audio

    utterances, config = heard(args), audio.FrontEndConfig(n_mels=args.mels)
    function = jax.jit(lambda x, n: audio.log_mel(x, n, config)[0])
    return lambda: jax.block_until_ready(function(*pad(utterances)))


def transformers_side(args):
    """Thunk -> features f32[B, T, F]."""
    import torch
    from transformers import ParakeetFeatureExtractor

    torch.set_num_threads(timing.threads())
    utterances, extract = heard(args), ParakeetFeatureExtractor(feature_size=args.mels)
    return lambda: extract(utterances, sampling_rate=16000, return_tensors="pt")["input_features"]
