"""TDT on CPUs: its loss with gradients, and greedy decoding, beside transformers' ParakeetForTDT.

    python -m experiments.benchmark transducer [--part=loss --lengths=ragged --rounds=7]
    python -m experiments.benchmark transducer --part=greedy [--batch=16 --seconds=10]
        [--nemo_python=.nemo-venv/bin/python]

`loss`: from both sides of the joint network, f32[B, T, J] and f32[B, U + 1, J], and the weights of
its output layer to the summed loss and the gradients of all four; transformers' joint network and
its loss are timed together. Peak memory is the growth of the resident set over one call.

`greedy`: from encoder frames [B, T, 512] to token ids and the frames at which they begin; the
encoder itself is left out on both sides (`get_audio_features` of transformers' model gives the
frames, through its projection). Weights are random, written by `interop.hf_parakeet` for
transformers; the blank's bias makes some three labels a second of them, as in speech. NeMo's
greedy_batch gives text and times of words and segments too, and is compared with all of that here.

Outputs are compared first; each side is timed, in turns with the other, in its own process.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from experiments.bench import lact, timing

DURATIONS = (0, 1, 2, 3, 4)
SIGMA = 0.02
SIZES = {  # of the parts' shapes: the 110M Parakeet's
    "loss": dict(B=4, T=125, U=40, V=1024, J=640),
    "greedy": dict(batch=16, seconds=10.0, V=1024, J=640, D=512),
}
RIVAL = pathlib.Path(__file__).resolve().parents[2] / "third_party" / "nemo" / "rival.py"
SIDES = ("jasr", "transformers", "jasr, words")
FRAME = 0.08  # seconds of an encoder frame


# ---- loss ----------------------------------------------------------------------------------------


def loss_problem(args):
    """(enc, pred, kernel, bias) and (enc_len, tokens, token_len)."""
    B, T, U, V, J = (getattr(args, name) for name in SIZES["loss"])
    rng = np.random.default_rng(0)
    enc, pred = (rng.standard_normal((B, n, J), dtype=np.float32) for n in (T, U + 1))
    outputs = V + 1 + len(DURATIONS)
    kernel, bias = (
        rng.uniform(-(J**-0.5), J**-0.5, shape).astype(np.float32)
        for shape in ((J, outputs), (outputs,))
    )
    tokens = rng.integers(0, V, (B, U)).astype(np.int32)
    enc_len, token_len = np.full(B, T, np.int32), np.full(B, U, np.int32)
    if args.lengths == "ragged":
        enc_len = np.linspace(T, 0.6 * T, B).astype(np.int32)
        token_len = np.linspace(U, 0.6 * U, B).astype(np.int32)
    return (enc, pred, kernel, bias), (enc_len, tokens, token_len)


def jasr_loss(args):
    """Thunk -> (summed loss, gradients of the four arrays)."""
    import jax

    from jasr.losses.transducer import tdt_loss

    arrays, rows = jax.device_put(loss_problem(args))

    def step(arrays, rows):
        def total(arrays):
            options = dict(blank=args.V, durations=DURATIONS, sigma=SIGMA)
            return tdt_loss(*arrays, *rows, **options)[0].sum()

        return jax.value_and_grad(total)(arrays)

    compiled = jax.jit(step).lower(arrays, rows).compile()
    return lambda: jax.block_until_ready(compiled(arrays, rows))


def transformers_loss(args):
    """The same of transformers' joint network and loss."""
    import torch
    from transformers import ParakeetTDTConfig
    from transformers.loss.loss_tdt import ParakeetForTDTLoss
    from transformers.models.parakeet.modeling_parakeet import ParakeetTDTJointNetwork

    torch.set_num_threads(timing.threads())
    (enc, pred, kernel, bias), rows = loss_problem(args)
    config = ParakeetTDTConfig(
        vocab_size=args.V + 1,
        blank_token_id=args.V,
        pad_token_id=args.V,
        decoder_hidden_size=args.J,
        durations=list(DURATIONS),
        hidden_act="relu",
    )
    joint = ParakeetTDTJointNetwork(config)
    joint.head.weight.data = torch.tensor(kernel.T.copy())
    joint.head.bias.data = torch.tensor(bias)
    enc, pred = (torch.tensor(x, requires_grad=True) for x in (enc, pred))
    enc_len, tokens, token_len = (torch.tensor(x, dtype=torch.long) for x in rows)

    def call():
        logits = joint(encoder_hidden_states=enc[:, :, None], decoder_hidden_states=pred[:, None])
        loss = ParakeetForTDTLoss(
            token_logits=logits[..., : args.V + 1],
            duration_logits=logits[..., args.V + 1 :],
            labels=tokens,
            logit_lengths=enc_len,
            label_lengths=token_len,
            blank_token_id=args.V,
            durations=list(DURATIONS),
            sigma=SIGMA,
            reduction="sum",
        )
        of = torch.autograd.grad(loss, [enc, pred, joint.head.weight, joint.head.bias])
        return loss.detach(), (of[0], of[1], of[2].T, of[3])

    return call


def compare_loss(ours, theirs):
    """Prints the differences; raises where the sides do not compute the same loss."""
    (loss, grads), (want, want_grads) = ours, theirs
    off = abs(float(loss) - float(want)) / float(want)
    worst = max(
        float(np.max(np.abs(np.asarray(a) - b.numpy())) / np.max(np.abs(b.numpy())))
        for a, b in zip(grads, want_grads, strict=True)
    )
    print(f"loss {float(want):.3f}: difference {off:.1e}; gradients {worst:.1e} of the largest")
    if not (off <= 1e-5 and worst <= 1e-4):
        raise SystemExit("the losses differ, nothing was timed")


# ---- greedy --------------------------------------------------------------------------------------


def transducer(args):
    """A NemoModel of kind "tdt": an encoder of one small layer, the rest of full size, random."""
    import jax

    from jasr import text
    from jasr.audio.features import FrontEndConfig
    from jasr.models.fastconformer.settings import FastConformerConfig
    from jasr.settings import to_dict
    from jasr.systems.fastconformer import nemo, nemo_config
    from jasr.systems.fastconformer.settings import LossConfig
    from jasr.systems.fastconformer.transducer import JointConfig, PredictionConfig
    from jasr.text import sentencepiece_model

    V, J, D = args.V, args.J, args.D
    encoder = FastConformerConfig(
        n_layers=1, d_model=D, n_heads=8, ff_expansion_factor=1, subsampling="dw_striding",
        subsampling_factor=8, subsampling_conv_channels=16, xscaling=False,
    )  # fmt: skip
    config = {
        "front_end": to_dict(FrontEndConfig()),
        "encoder": to_dict(encoder),
        "decoder": to_dict(PredictionConfig(vocab_size=V, pred_hidden=J)),
        "joint": to_dict(JointConfig(V, D, J, J, num_extra_outputs=len(DURATIONS))),
        "loss": to_dict(LossConfig()),
        "decoding": {"strategy": "greedy_batch", "max_symbols": 10},
    }
    rng = np.random.default_rng(1)

    def weight(path, shape):
        name, rows = path[-1].key, shape.shape[0]
        spread = {"kernel": 2.0, "embedding": 10.0}.get(name, 0.5)  # that texts differ
        scale = spread * (J if "lstm" in str(path) else rows) ** -0.5
        return rng.uniform(-scale, scale, shape.shape).astype(np.float32)

    shapes = nemo.shapes(nemo_config.Settings("tdt", config), V)
    variables = jax.tree_util.tree_map_with_path(weight, shapes)
    params = variables["params"]
    params["decoder"]["prediction"]["embed"]["embedding"][V] = 0.0
    bias = params["joint"]["joint_net"]["bias"]
    bias[V] = args.blank_bias
    bias[V + 1 + DURATIONS.index(0)] = -3.0  # transformers has no max_symbols for TDT
    pieces = [sentencepiece_model.Piece.of("<unk>", type=sentencepiece_model.UNKNOWN)]
    pieces += [sentencepiece_model.Piece.of(f"\u2581{i}", -i) for i in range(1, V)]
    tokenizer = sentencepiece_model.Model((), ()).with_pieces(pieces)
    tokenizer = text.SentencePieceTokenizer(tokenizer.to_bytes()).to_dict()
    return nemo.NemoModel("tdt", config, tokenizer, variables)


def frames_of(args):
    """Encoder frames f32[B, T, D] and their numbers i32[B]."""
    T = round(args.seconds / FRAME)
    rng = np.random.default_rng(2)
    frames = rng.standard_normal((args.batch, T, args.D), dtype=np.float32)
    return frames, np.linspace(T, 0.7 * T, args.batch).astype(np.int32)


def jasr_greedy(args, folder, words=False):
    """Thunk -> (ids, first frames) of each row; `words`: with text and NeMo's timestamps too."""
    import jax

    from jasr.decoding.transducer import Steps, greedy
    from jasr.systems import loading

    task, variables, _ = loading.load(folder)

    @jax.jit
    def decode(variables, table, frames, length):
        run = functools.partial(task.model.apply, variables)
        steps = Steps(
            predict=functools.partial(run, method="step", table=table),
            initial_state=functools.partial(run, method="initial_state"),
            output=functools.partial(run, method="joint_output"),
        )
        options = dict(blank=args.V, durations=DURATIONS, window=args.window)
        return greedy(run(frames, method="encoder_part"), length, steps, **options)

    times = task.verbs["transcribe"].extras["nemo"]
    table = jax.jit(task.tables)(variables)["gates"]  # once for a model, as the recogniser does
    given = jax.device_put((variables, table, *frames_of(args)))

    def call():
        found = jax.device_get(decode(*given))
        names = ("tokens", "start_frame", "end_frame", "durations")
        rows = [
            [found[name][row, :n] for name in names] for row, n in enumerate(found["token_len"])
        ]
        if words:
            [(task.tokenizer.decode(row[0].tolist()), times(*row, meta={})) for row in rows]
        return [(ids.tolist(), begins.tolist()) for ids, begins, *_ in rows]

    return call


def transformers_greedy(args, folder):
    """The same of transformers' `generate`."""
    import torch
    from transformers import ParakeetForTDT
    from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderModelOutput

    torch.set_num_threads(timing.threads())
    model = ParakeetForTDT.from_pretrained(folder).eval()
    frames, length = map(torch.tensor, frames_of(args))
    mask = torch.arange(frames.shape[1])[None] < length[:, None]

    def encoded(**_):
        projected = model.encoder_projector(frames)
        return ParakeetEncoderModelOutput(
            last_hidden_state=frames, pooler_output=projected, attention_mask=mask
        )

    model.get_audio_features = encoded
    mel = torch.zeros(frames.shape[0], 8 * frames.shape[1], 80)  # for its length alone

    def call():
        with torch.no_grad():
            out = model.generate(input_features=mel)
        begins = out.durations.cumsum(1) - out.durations
        ids, begins, durations = (x.numpy() for x in (out.sequences, begins, out.durations))
        rows = []
        for row in range(args.batch):
            inside = (ids[row] < args.V) & (begins[row] < int(length[row]))
            rows.append((ids[row][inside].tolist(), begins[row][inside].tolist()))
        return rows

    return call


def compare_greedy(ours, theirs, args):
    """Prints how much was found; raises where ids or frames differ."""
    seconds = FRAME * float(frames_of(args)[1].sum())
    labels = sum(len(ids) for ids, _ in ours)
    print(f"{labels} labels in {seconds:.0f} s of frames, {labels / seconds:.1f} a second")
    if ours != theirs:
        raise SystemExit("ids or frames differ, nothing was timed")


# ---- reports -------------------------------------------------------------------------------------


def command(task, side, part, args, folder=None):
    """The command line of this module that does `task` ("serve", "memory_of") for a side."""
    line = [sys.executable, "-m", "experiments.bench.transducer", f"--{task}={side}"]
    line += [f"--part={part}", f"--lengths={args.lengths}", f"--blank_bias={args.blank_bias}"]
    line += [f"--{name}={getattr(args, name)}" for name in {**SIZES["loss"], **SIZES["greedy"]}]
    return [*line, f"--window={args.window}", *([f"--folder={folder}"] if folder else [])]


def loss_report(args):
    sides = {"jasr": jasr_loss, "transformers": transformers_loss}
    compare_loss(*(make(args)() for make in sides.values()))
    lines = {side: command("serve", side, "loss", args) for side in ("transformers", "jasr")}
    times = timing.in_turns(lines, args.rounds)
    extra = []
    if os.path.exists("/proc/self/clear_refs"):
        used = {side: memory(command("memory_of", side, "loss", args)) for side in sides}
        extra.append(
            f"peak memory: jasr {used['jasr'] / 2**20:.0f} MiB, transformers "
            f"{used['transformers'] / 2**20:.0f} MiB, ratio "
            f"{used['jasr'] / used['transformers']:.2f}"
        )
    shape = " ".join(f"{name}{getattr(args, name)}" for name in SIZES["loss"])
    title = f"TDT loss + gradients, {shape}, {args.lengths} lengths, {timing.threads()} threads"
    timing.report(title, times, ours="jasr", peer="transformers", extra=extra)


def memory(line):
    """Bytes that a `memory_of` process prints."""
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["bytes"]


def memory_of(side, args):
    """Prints JSON: growth of the resident set over one step, after one of small shapes."""
    make = {"jasr": jasr_loss, "transformers": transformers_loss}[side]
    make(argparse.Namespace(**vars(args) | dict(T=16, U=8)))()
    print(json.dumps({"bytes": lact.growth(make(args))}))


def greedy_report(args):
    from jasr.systems.fastconformer import hf_parakeet, nemo

    with tempfile.TemporaryDirectory() as folder:
        model = transducer(args)
        hf_parakeet.write(folder, model)
        ours = jasr_greedy(args, folder)()
        compare_greedy(ours, transformers_greedy(args, folder)(), args)
        sides = ["transformers", "jasr", *(["jasr, words"] if args.nemo_python else [])]
        lines = {side: command("serve", side, "greedy", args, folder) for side in sides}
        ready = None
        if args.nemo_python:
            nemo.write(f"{folder}/model.nemo", model)
            frames, length = frames_of(args)
            np.savez(f"{folder}/in.npz", encoded=frames, encoded_len=length)
            given = f"--model={folder}/model.nemo --input={folder}/in.npz --output={folder}/out.npz"
            threads = f"--threads={timing.threads()}"
            lines["NeMo"] = [args.nemo_python, str(RIVAL), "greedy", *given.split(), threads]

            def ready():
                compare_greedy(ours, nemo_rows(f"{folder}/out.npz"), args)

        times = timing.in_turns(lines, args.rounds, ready)
    title = f"TDT greedy, {args.batch} x {args.seconds:g} s of frames, {timing.threads()} threads"
    timing.report(title, times, ours="jasr", peer="transformers")
    if args.nemo_python:
        timing.report(f"{title}, with text and words", times, ours="jasr, words", peer="NeMo")


def nemo_rows(path):
    """What NeMo found, as `compare_greedy` takes it."""
    with np.load(path) as found:
        columns = zip(found["tokens"], found["start_frame"], found["token_len"], strict=True)
        return [(ids[:n].tolist(), begins[:n].tolist()) for ids, begins, n in columns]


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="benchmark transducer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=("loss", "greedy", "all"), default="all")
    parser.add_argument("--lengths", choices=("ragged", "full"), default="ragged")
    parser.add_argument("--rounds", type=int, default=7)
    for name, default in {**SIZES["loss"], **SIZES["greedy"]}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--blank_bias", type=float, default=3.0, help="sets the labels a second")
    parser.add_argument("--window", type=int, default=0, help="0 = the decoder's own")
    for task in ("serve", "memory_of"):
        parser.add_argument(f"--{task}", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--nemo_python", default="", help="the Python of NeMo's environment")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory_of:
        return memory_of(args.memory_of, args)
    if args.serve and args.part == "loss":
        make = {"jasr": jasr_loss, "transformers": transformers_loss}[args.serve]
        return timing.serve(make(args))
    if args.serve:
        make = transformers_greedy
        if args.serve != "transformers":
            make = functools.partial(jasr_greedy, words="words" in args.serve)
        return timing.serve(make(args, args.folder))
    print(timing.machine())
    if args.part != "greedy":
        loss_report(args)
    if args.part != "loss":
        greedy_report(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
