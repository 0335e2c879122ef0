"""FastConformer beside transformers' Parakeet and NeMo: encoder forward, or a CTC training step.

    python -m experiments.benchmark parakeet                               # encoder, 110M, 4 x 10 s
    python -m experiments.benchmark parakeet --batch=1 --seconds=30
    python -m experiments.benchmark parakeet --part=step                   # CTC training step
    python -m experiments.benchmark parakeet --size=tiny --nemo_python=.nemo-venv/bin/python

A CTC model of random weights is written once, as a Hugging Face directory and as a .nemo, and every
side loads the same weights. `encoder`: log-mel frames to encoder frames. `step`: from log-mel
frames, CTC loss, gradients and AdamW (PyTorch's fused one), in training mode with every dropout 0.
Outputs, or the losses of the first step, are compared first; each side runs in a process of its
own, in turns. `--size` sets the model, which its other options change.
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np

from experiments import huge_pages
from experiments.bench import timing
from experiments.bench.lact import resident, trim

SIZES = {
    "tiny": dict(layers=2, d_model=64, heads=4, channels=32),
    "small": dict(layers=16, d_model=176, heads=4, channels=176),
    "110m": dict(layers=17, d_model=512, heads=8, channels=256),
}
RIVAL = pathlib.Path(__file__).resolve().parents[2] / "third_party" / "nemo" / "rival.py"
LEARNING_RATE = 1e-3


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmark parakeet", description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("encoder", "step"), default="encoder")
    parser.add_argument("--size", choices=SIZES, default="110m")
    for name in SIZES["tiny"]:
        parser.add_argument(f"--{name}", type=int, help="of the model, in place of the size's")
    parser.add_argument("--mels", type=int, default=80)
    parser.add_argument("--vocabulary", type=int, default=1024, help="pieces, without the blank")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the longest utterance")
    parser.add_argument("--shortest", type=float, default=0.75, help="as a share of the longest")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--nemo_python", default="", help="the Python of NeMo's environment")
    parser.add_argument("--serve", choices=("jasr", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, value in SIZES[args.size].items():
        setattr(args, name, getattr(args, name) or value)
    if args.serve:
        return serve(args)
    with tempfile.TemporaryDirectory() as directory:
        parameters = write(args, pathlib.Path(directory))
        return measure(
            args, pathlib.Path(directory), parameters, sys.argv[1:] if argv is None else argv
        )


def config(args):
    """The run's config of the model, as `tasks.build` takes it."""
    encoder = dict(
        feat_in=args.mels,
        n_layers=args.layers,
        d_model=args.d_model,
        n_heads=args.heads,
        subsampling="dw_striding",
        subsampling_factor=8,
        subsampling_conv_channels=args.channels,
        conv_kernel_size=9,
        xscaling=False,
        dropout=0.0,
        dropout_pre_encoder=0.0,
        dropout_emb=0.0,
        dropout_att=0.0,
    )
    return {
        "task": "fastconformer",
        "model": {"kind": "ctc", "encoder": encoder},
        "front_end": {"n_mels": args.mels},
        "loss": {"kind": "ctc", "reduction": "mean"},
    }


def write(args, directory):
    """Writes the model both ways and the inputs; the number of parameters."""
    import jax

    from jasr import text, tree
    from jasr.systems import loading, source
    from jasr.text import sentencepiece_model as spm

    pieces = [spm.Piece.of("<unk>", type=spm.UNKNOWN)]
    pieces += [spm.Piece.of(f"\u2581{n}", -float(n)) for n in range(1, args.vocabulary)]
    model = spm.Model(tuple(pieces), ()).with_settings(model_type=1)
    task = loading.build(config(args), text.SentencePieceTokenizer(model.to_bytes()))
    frames = int(100 * args.seconds)
    rng = np.random.default_rng(0)
    length = (np.linspace(args.shortest, 1, args.batch)[::-1] * frames).astype(np.int32)
    mel = rng.standard_normal((args.batch, frames, args.mels), dtype=np.float32)
    inputs = {
        "mel": np.where(np.arange(frames)[:, None] < length[:, None, None], mel, 0),
        "mel_len": length,
        "tokens": rng.integers(1, args.vocabulary, (args.batch, max(1, int(4 * args.seconds)))),
        "token_len": (length // 25).clip(1),
    }
    shapes = inputs["mel"][:1, :16], np.array([16], np.int32), inputs["tokens"][:1]
    variables = jax.jit(task.model.init)(jax.random.key(0), *shapes)
    variables = jax.tree.map(np.asarray, dict(variables))
    meta = {"config": config(args), "tokenizer": task.tokenizer.to_dict()}
    source.export("hf", directory / "hf", meta, tree.flatten(variables), {})
    if args.nemo_python:
        source.export("nemo", directory / "model.nemo", meta, tree.flatten(variables), {})
    np.savez(directory / "inputs.npz", **inputs)
    return tree.count(variables["params"])


# ---- the sides: thunk -> {name: array} -----------------------------------------------------------


def jasr_side(args, directory, inputs):
    import jax
    import optax

    from jasr.losses.ctc import ctc_loss
    from jasr.losses.reduction import contribution, scale_and_count
    from jasr.systems import loading

    task, variables, _ = loading.load(directory / "hf")
    variables, inputs = jax.device_put((variables, inputs))
    apply = task.model.apply
    if args.part == "encoder":
        encode = jax.jit(lambda v, mel, n: apply(v, mel, n, method="encode"))

        def forward():
            encoded, length = encode(variables, inputs["mel"], inputs["mel_len"])
            return {"encoded": jax.block_until_ready(encoded), "encoded_len": length}

        return forward

    tx = optax.adamw(LEARNING_RATE, weight_decay=0.0)

    def loss_of(params, stats, x):
        (encoded, length), changed = apply(
            {"params": params, "batch_stats": stats},
            x["mel"],
            x["mel_len"],
            train=True,
            method="encode",
            mutable=["batch_stats"],
        )
        logits = apply({"params": params}, encoded, method="ctc_logits")
        tokens, token_len = x["tokens"], x["token_len"]
        losses, good = ctc_loss(logits, length, tokens, token_len, blank=task.config.blank)
        scale, count = scale_and_count(token_len, good, "mean")
        return contribution(losses, scale, count.sum()), changed["batch_stats"]

    def step(state, x):
        params, stats, opt_state = state
        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params, stats, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    state = variables["params"], variables["batch_stats"], tx.init(variables["params"])
    program = jax.jit(step, donate_argnums=0).lower(state, inputs).compile()
    box = [state]

    def train():
        box[0], loss = program(box[0], inputs)
        return {"loss": jax.block_until_ready(loss)}

    return train


def transformers_side(args, directory, inputs):
    import torch
    from transformers import ParakeetForCTC

    torch.set_num_threads(timing.threads())
    model = ParakeetForCTC.from_pretrained(directory / "hf")
    mel = torch.tensor(inputs["mel"])
    mask = torch.arange(mel.shape[1]) < torch.tensor(inputs["mel_len"])[:, None]
    if args.part == "encoder":
        model.eval()

        def forward():
            with torch.inference_mode():
                out = model.encoder(mel, attention_mask=mask, output_attention_mask=True)
            return {"encoded": out.last_hidden_state, "encoded_len": out.attention_mask.sum(-1)}

        return forward

    place = np.arange(inputs["tokens"].shape[1]) < inputs["token_len"][:, None]
    labels = torch.tensor(np.where(place, inputs["tokens"], model.config.pad_token_id))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)

    def train():
        optimizer.zero_grad()
        loss = model(mel, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return train


SIDES = {"jasr": jasr_side, "transformers": transformers_side}


def serve(args):
    """Runs one side for `timing.in_turns`; the first results go to the directory."""
    directory = pathlib.Path(args.directory)
    call = SIDES[args.serve](args, directory, dict(np.load(directory / "inputs.npz")))
    np.savez(directory / f"{args.serve}.npz", **{k: np.asarray(v) for k, v in call().items()})
    trim()
    timing.serve(call)
    (directory / f"{args.serve}.peak").write_text(str(resident("VmHWM")))


# ---- the row -------------------------------------------------------------------------------------


def measure(args, directory, parameters, argv):
    """Runs, compares and reports."""
    own = [sys.executable, "-m", "experiments.bench.parakeet", *argv, f"--directory={directory}"]
    lines = {side: [*own, f"--serve={side}"] for side in ("transformers", "jasr")}
    if args.nemo_python:
        lines["nemo"] = [
            args.nemo_python,
            str(RIVAL),
            args.part,
            f"--model={directory / 'model.nemo'}",
            f"--input={directory / 'inputs.npz'}",
            f"--output={directory / 'nemo.npz'}",
            f"--threads={timing.threads()}",
        ]
    print(timing.machine())
    times = timing.in_turns(lines, args.rounds, ready=lambda: compare(directory, lines))
    median = {side: timing.quartiles(values)[1] for side, values in times.items()}
    seconds = float(np.load(directory / "inputs.npz")["mel_len"].sum()) / 100
    extra = [f"{parameters / 1e6:.1f} M parameters, {seconds:.0f} s of audio a call"]
    for side, m in median.items():
        peak = directory / f"{side}.peak"
        memory = f", peak memory {int(peak.read_text()) / 2**20:.0f} MiB" if peak.exists() else ""
        extra.append(f"{side}: {seconds / m:.0f} audio-seconds a second{memory}")
    peer = min((side for side in median if side != "jasr"), key=median.get)
    what = {"encoder": "encoder forward", "step": "CTC training step"}[args.part]
    title = f"{what}, {args.layers} x {args.d_model}, {args.batch} x {args.seconds:g} s"
    timing.report(title, times, ours="jasr", peer=peer, extra=extra)


def compare(directory, sides):
    """Prints the largest differences from jasr's results; raises where they are too large."""
    ours = dict(np.load(directory / "jasr.npz"))
    for side in sides:
        theirs = dict(np.load(directory / f"{side}.npz"))
        if side == "jasr":
            continue
        if "loss" in ours:
            loss = float(ours["loss"])
            off = abs(loss / float(theirs["loss"]) - 1)
            line, good = f"loss {loss:.4f}, relative difference {off:.1e}", off < 1e-4
        else:
            valid = np.arange(ours["encoded"].shape[1]) < ours["encoded_len"][:, None]
            worst = np.abs(ours["encoded"] - theirs["encoded"])[valid].max()
            line, good = f"largest difference of the outputs {worst:.1e}", worst < 1e-3
            good = good and (ours["encoded_len"] == theirs["encoded_len"]).all()
        print(f"{side}: {line}")
        if not good:
            raise SystemExit("the two sides do not compute the same; nothing was timed")


if __name__ == "__main__":
    huge_pages.use()
    main()
