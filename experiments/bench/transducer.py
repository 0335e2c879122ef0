"""TDT on CPUs: its loss with gradients, and greedy decoding, beside transformers' ParakeetForTDT.

    python -m experiments.benchmark transducer [--part=loss --lengths=ragged --rounds=7]
    python -m experiments.benchmark transducer --part=greedy [--batch=16 --seconds=10]
        [--nemo_python=.nemo-venv/bin/python]

`loss`: from both sides of the joint network, f32[B, T, J] and f32[B, U + 1, J], and the weights of
its output layer to the summed loss and the gradients of all four; transformers' joint network and
its loss are timed together. Peak memory is the growth of the resident set over one call.

`greedy`: from encoder frames [B, T, 512] to token ids and the frames at which they begin; the
encoder itself is left out on both sides (`get_audio_features` of transformers' model gives the
frames, through its projection). Weights are random; the blank's bias makes some three labels a
second of them, as in speech. NeMo's greedy_batch gives text and times of words and segments too,
and is compared with all of that here.

Outputs are compared first; each side is timed, in turns with the other, in its own process.
"""

import argparse
import functools
import tempfile

import numpy as np

from experiments.bench import models, timing

DURATIONS = (0, 1, 2, 3, 4)
SIGMA = 0.02
SIZES = {  # of the parts' shapes: the 110M Parakeet's
    "loss": dict(B=4, T=125, U=40, V=1024, J=640),
    "greedy": dict(batch=16, seconds=10.0, V=1024, J=640, D=512),
}
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


def write(args, folder):
    """Writes a TDT model: an encoder of one small layer, the rest of full size."""
    V, J = args.V, args.J
    model = {"kind": "tdt", "decoder": {"pred_hidden": J}, "joint": {"joint_hidden": J}}
    model["encoder"] = dict(
        n_layers=1, d_model=args.D, n_heads=8, ff_expansion_factor=1, subsampling_conv_channels=16
    )
    task, meta = models.build(model, V)
    rng = np.random.default_rng(1)

    def weight(path, shape):
        spread = {"kernel": 2.0, "embedding": 10.0}.get(path.split("/")[-1], 0.5)  # texts differ
        scale = spread * (J if "lstm" in path else shape[0]) ** -0.5
        return rng.uniform(-scale, scale, shape).astype(np.float32)

    leaves = models.random_leaves(task, weight)
    leaves["params/decoder/prediction/embed/embedding"][V] = 0.0
    bias = leaves["params/joint/joint_net/bias"]
    bias[V] = args.blank_bias
    bias[V + 1 + DURATIONS.index(0)] = -3.0  # transformers has no max_symbols for TDT
    models.write(folder, meta, leaves, ("hf", *(["nemo"] if args.nemo_python else [])))


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

    task, variables, _ = loading.load(f"{folder}/model.hf")

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
    model = ParakeetForTDT.from_pretrained(f"{folder}/model.hf").eval()
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


def loss_report(args):
    sides = {"jasr": jasr_loss, "transformers": transformers_loss}
    compare_loss(*(make(args)() for make in sides.values()))
    lines = {name: timing.served(sides[name], args) for name in ("transformers", "jasr")}
    times = timing.in_turns(lines, args.rounds)
    small = argparse.Namespace(**vars(args) | dict(T=16, U=8))
    extra = timing.peak_memory(sides, [args], [small])
    shape = " ".join(f"{name}{getattr(args, name)}" for name in SIZES["loss"])
    title = f"TDT loss + gradients, {shape}, {args.lengths} lengths, {timing.threads()} threads"
    timing.report(title, times, ours="jasr", peer="transformers", extra=extra)


def greedy_report(args):
    with tempfile.TemporaryDirectory() as folder:
        write(args, folder)
        frames, length = frames_of(args)
        np.savez(f"{folder}/inputs.npz", encoded=frames, encoded_len=length)
        ours = jasr_greedy(args, folder)()
        compare_greedy(ours, transformers_greedy(args, folder)(), args)
        lines = {
            "transformers": timing.served(transformers_greedy, args, folder),
            "jasr": timing.served(jasr_greedy, args, folder),
        }
        ready = None
        if args.nemo_python:
            lines["jasr, words"] = timing.served(jasr_greedy, args, folder, True)
            lines |= timing.nemo(args, "greedy", folder)

            def ready():
                compare_greedy(ours, nemo_rows(f"{folder}/NeMo.npz"), args)

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
    numbers = {**SIZES["loss"], **SIZES["greedy"], "rounds": 7}
    parser = timing.parser("transducer", __doc__, **numbers)
    parser.add_argument("--part", choices=("loss", "greedy", "all"), default="all")
    parser.add_argument("--lengths", choices=("ragged", "full"), default="ragged")
    parser.add_argument("--blank_bias", type=float, default=3.0, help="sets the labels a second")
    parser.add_argument("--window", type=int, default=0, help="0 = the decoder's own")
    parser.add_argument("--nemo_python", default="", help="the Python of NeMo's environment")
    args = parser.parse_args(argv)
    print(timing.machine())
    if args.part != "greedy":
        loss_report(args)
    if args.part != "loss":
        greedy_report(args)
